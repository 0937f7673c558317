# Ruyi in C. `make help` lists the targets.
#
# The results do not depend on any flag here but -ffp-contract=off, which every build needs: optimisation, instruction
# set and OpenMP change the time, never a byte. The instruction set is chosen at build time (-march=native), because
# one text then compiles to whatever the machine has, without a dispatcher. Override with NATIVE= (portable, slow
# without the machine's fma) or NATIVE=-mavx2\ -mfma; build without threads with OPENMP= .

CC       ?= cc
CFLAGS   ?= -O3
WARNINGS  = -Wall -Wextra -Wpedantic -Wshadow -Wconversion
works     = $(shell t=$$(mktemp) && printf 'int main(void) { return 0; }\n' | $(CC) $(1) -x c - -o $$t 2>/dev/null && \
              echo '$(1)'; rm -f $$t)
NATIVE   := $(call works,-march=native)
OPENMP   := $(call works,-fopenmp)
# What the compiler may assume: nobody reads errno or floating-point traps. It lets loops become vectors.
NUMERIC   = -ffp-contract=off -fno-math-errno -fno-trapping-math
FLAGS     = -std=c11 $(CFLAGS) $(NUMERIC) $(NATIVE) $(OPENMP) $(WARNINGS)
SOURCES   = ruyi.c vae.c dit.c tensor.c io.c

.PHONY: all demo test mutants report goldens asan fuzz faults bench identity lint clean help

all: ruyi

ruyi: $(SOURCES:%.c=build/float/%.o)
	$(CC) $(FLAGS) $^ -lm -o $@

ruyi64: $(SOURCES:%.c=build/double/%.o)
	$(CC) $(FLAGS) $^ -lm -o $@

build/float/%.o: %.c ruyi.h Makefile
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -c $< -o $@

build/double/%.o: %.c ruyi.h Makefile
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -DREAL=double -c $< -o $@

# What the unit tests check has no command line: they include the sources.
build/ops build/ops64: tests/ops.c tests/pack.h $(SOURCES) ruyi.h Makefile
	@mkdir -p $(@D)
	$(CC) $(filter-out -Wshadow,$(FLAGS)) -DREAL=$(if $(findstring 64,$@),double,float) tests/ops.c -lm -o $@

build/pack: tests/pack.c tests/pack.h io.c tensor.c ruyi.h Makefile
	@mkdir -p $(@D)
	$(CC) $(filter-out -Wshadow,$(FLAGS)) tests/pack.c -lm -o $@

build/unit build/unit64: tests/unit.c tests/io_test.h $(SOURCES) ruyi.h Makefile
	@mkdir -p $(@D)
	$(CC) $(filter-out -Wshadow,$(FLAGS)) -DREAL=$(if $(findstring 64,$@),double,float) tests/unit.c -lm -o $@

# Every reader on damaged files; every command on a system that refuses. One thread: both leave functions in strange ways.
PLAIN = -std=c11 $(NUMERIC) $(NATIVE) $(filter-out -Wshadow,$(WARNINGS)) -Wno-unknown-pragmas
build/damage: tests/fuzz/fuzz.c $(SOURCES) ruyi.h Makefile
	@mkdir -p $(@D)
	$(CC) -O2 $(PLAIN) -DEXHAUSTIVE $< -lm -o $@
build/faults: tests/faults.c $(SOURCES) ruyi.h Makefile
	@mkdir -p $(@D)
	$(CC) -O2 $(PLAIN) $< -lm -o $@

# Address and undefined-behaviour sanitizers; small, so that the tests under it end in minutes.
SANITIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
asan: build/ruyi-asan build/unit-asan build/damage-asan build/faults-asan
build/damage-asan: tests/fuzz/fuzz.c $(SOURCES) ruyi.h Makefile
	@mkdir -p $(@D)
	$(CC) $(SANITIZE) $(PLAIN) -DEXHAUSTIVE $< -lm -o $@
build/faults-asan: tests/faults.c $(SOURCES) ruyi.h Makefile
	@mkdir -p $(@D)
	$(CC) $(SANITIZE) $(PLAIN) $< -lm -o $@
build/ruyi-asan: $(SOURCES) ruyi.h Makefile
	@mkdir -p $(@D)
	$(CC) $(SANITIZE) $(PLAIN) $(SOURCES) -lm -o $@
build/unit-asan: tests/unit.c tests/io_test.h $(SOURCES) ruyi.h Makefile
	@mkdir -p $(@D)
	$(CC) $(SANITIZE) $(PLAIN) $< -lm -o $@

# Threads that wait sleep, since somebody else may be using the machine.
demo: ruyi
	OMP_WAIT_POLICY=passive ./ruyi -m weights/ruyi-tiny -i weights/start/meadow.ppm --frames 24 --size 128x128 --camera left --motion 2 -o out.y4m
	@echo
	@echo "out.y4m is one second of animation, made from weights/start/meadow.ppm by the embedded model: the camera pans left."
	@echo "Watch it:    ffplay -loop 0 out.y4m        (or mpv, VLC)"
	@echo "Convert it:  ffmpeg -i out.y4m out.mp4     or a frame each: ffmpeg -i out.y4m frame-%04d.png"
	@echo
	@echo "Asked for: camera left, motion 2. Measured (ruyi measure out.y4m --start weights/start/meadow.ppm):"
	@./ruyi measure out.y4m --start weights/start/meadow.ppm

build/controls: tests/controls.c build/float/io.o build/float/tensor.o ruyi.h Makefile
	$(CC) $(FLAGS) $(filter %.c %.o,$^) -lm -o $@

test: ruyi ruyi64 build/unit build/unit64 build/ops build/ops64 build/pack build/controls build/damage build/faults
	tests/run.sh

# The golden pack's list of contents. Its margins are those of the mutants.
MANIFEST = build/pack manifest >build/MANIFEST && mv build/MANIFEST tests/golden/MANIFEST

# What of the golden pack is ours, byte for byte the same on every machine: operators, and the list of contents.
goldens: build/ops64 build/pack
	build/ops64 tests/golden/ops tests/ops_floors.tsv
	$(MANIFEST)

# Readers under clang's libFuzzer: SECONDS or RUNS for each.
CLANG   ?= clang
SECONDS ?= 60
fuzz:
	@mkdir -p build
	@if printf 'int LLVMFuzzerTestOneInput(void) { return 0; }\n' | $(CLANG) -fsanitize=fuzzer -x c - -o build/fuzz 2>build/fuzz.log; then \
	    $(CLANG) -fsanitize=fuzzer $(SANITIZE) -O2 $(PLAIN) tests/fuzz/fuzz.c -lm -o build/fuzz && \
	    tests/fuzz/fuzz.sh build/fuzz $(if $(RUNS),-runs=$(RUNS),-max_total_time=$(SECONDS)); \
	else echo "skipped fuzz: $(CLANG) has no libFuzzer: $$(tail -n 1 build/fuzz.log)"; fi

# Every call of every kind fails once, in every command. Takes a quarter of an hour.
faults: build/faults
	build/faults -a

# Every mutant of tests/mutants.txt must be caught by the golden pack. PATTERN: only those whose line has it.
mutants: ruyi ruyi64 build/pack
	CC="$(CC)" FLAGS="-std=c11 $(NUMERIC) $(NATIVE) $(OPENMP)" tests/mutants.sh '$(PATTERN)'
	$(MANIFEST)

# The tables of README.md; FULL=1: with all builds and mutants anew.
report: ruyi ruyi64 build/ops64 build/controls
	@FULL=$(FULL) tests/report.sh ./ruyi ./ruyi64

# Times beside PyTorch (PYTHON=a Python that has it) and OpenBLAS (if installed). Says what is missing; never fails.
bench: ruyi
	tests/bench.sh ./ruyi

# What gcc, clang, cppcheck and clang-tidy say of the sources; exceptions, with reasons, in tests/lint.txt.
lint:
	tests/lint.sh

# One hash over compilers, optimisation levels, instruction sets, threads and machines. Takes a quarter of an hour.
identity:
	tests/identity.sh

clean:
	rm -rf build ruyi ruyi64 out.y4m

help:
	@echo "make            ruyi, the program (float32)"
	@echo "make demo       animate a picture with the embedded model into out.y4m"
	@echo "make test       all tests: units, golden cases in both precisions, the command line"
	@echo "make goldens    the operators' golden cases and the pack's MANIFEST anew: the same bytes as before, or something moved"
	@echo "make ruyi64     the same program in float64, the oracle"
	@echo "make asan       build/ruyi-asan and the tests under address and undefined-behaviour sanitizers"
	@echo "make fuzz       every reader under libFuzzer (clang), SECONDS=60 or RUNS=N each"
	@echo "make faults     every command with every call of the system failing, one at a time"
	@echo "make mutants    does the golden pack catch every mutant of the numeric code? half an hour"
	@echo "make report     what the results are worth, in tables; FULL=1: with builds and mutants anew, an hour"
	@echo "make bench      kernels beside PyTorch and OpenBLAS (PYTHON=a Python with torch)"
	@echo "make identity   the same bytes from every compiler, level, instruction set, thread count and machine at hand"
	@echo "make lint       what compilers and analysers say of the sources: nothing, but for the exceptions of tests/lint.txt"
	@echo "make clean      remove what was built"
	@echo "CC=clang, CFLAGS=-O2, NATIVE=, OPENMP=  choose compiler, optimisation, instruction set, threads"
