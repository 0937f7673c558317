/* io_test.h - tests of io.c: parsers on valid, broken and damaged bytes, and the exact picture operations.
 *
 * Included by unit.c, which includes io.c before it and defines CHECK(condition, "text", ...).
 */

/* A literal and its size, with the zero bytes inside. */
#define BYTES(text) (const unsigned char *)(text), sizeof(text) - 1

/* ---------------------------------------------------------------- JSON */

static bool json_takes(const char *text, size_t size, bool minus_infinity)
{
    char reason[REASON];
    json root;
    return json_check(text, size, minus_infinity, &root, reason);
}

static void test_json_grammar(void)
{
    static const char *const good[] = {
        "{}", "[]", "0", "-0", "-0.5e+10", "1E5", "\"\"", "true", " \t\r\nnull \n", "[1,2 , 3]", "{\"a\":{\"b\":[{}]}}",
        "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\"", "\"\\ud83d\\ude00\"", "\"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\x7f\"",
        "{\"a\":1,\"a\":2}", "[[],[],{}]", "\"\\u0000\"", "\"\xf4\x8f\xbf\xbf\"",
    };
    static const char *const bad[] = {
        "", " ", "{", "[", "}", "{]", "[}", "[1,]", "{\"a\":1,}", "{,}", "[,]", "{\"a\"}", "{\"a\":}", "{a:1}", "{1:1}",
        "01", "1.", ".5", "+1", "1e", "1e+", "-", "0x1", "NaN", "Infinity", "-Infinity", "tru", "nulls", "1 2", "{}{}",
        "\"", "\"a", "\"\\", "\"\\x\"", "\"\\u12g4\"", "\"\\u123", "\"\\ud800\"", "\"\\ud800\\u0041\"", "\"\\udc00\"",
        "\"\\ud800\\ud800\"", "\"\t\"", "\"\n\"", "'a'", "[1 2]", "{\"a\":1 \"b\":2}", "// x\n1", "/* x */1",
        "\xef\xbb\xbf{}", "\"\xc0\x80\"", "\"\xed\xa0\x80\"", "\"\xe0\x80\x80\"", "\"\xf4\x90\x80\x80\"", "\"\xff\"",
        "\"\xc3\"", "\"\xe2\x82\"", "\"\xf0\x80\x80\x80\"", "\"\x80\"", "[\"\\ud800\\udbff\"]",
    };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        CHECK(json_takes(good[i], strlen(good[i]), false), "json: refused %s", good[i]);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(!json_takes(bad[i], strlen(bad[i]), false), "json: took %s", bad[i]);
    CHECK(!json_takes("1\0", 2, false) && !json_takes("\"\0\"", 3, false), "json: took a NUL");
    CHECK(json_takes("[-Infinity]", 11, true) && !json_takes("[Infinity]", 10, true), "json: -Infinity");
    char deep[2 * 129];
    for (int levels = 128; levels <= 129; levels++) {
        memset(deep, '[', (size_t)levels);
        memset(deep + levels, ']', (size_t)levels);
        CHECK(json_takes(deep, 2 * (size_t)levels, false) == (levels == 128), "json: %d levels", levels);
        CHECK(!json_takes(deep, (size_t)levels, false), "json: %d levels that stay open", levels);
    }
}

static json json_of(const char *text)
{
    char reason[REASON];
    json root = {0};
    CHECK(json_check(text, strlen(text), true, &root, reason), "json: %s: %s", text, reason);
    return root;
}

static void test_json_values(void)
{
    json root = json_of(" { \"a\" : [1, \"]\\\"}\", {\"b\" : [ ] } ] "
                        ",\"n\":-1.5e2,\"a\\u0062\": null, \"d\": 1, \"d\": 2 } ");
    json list = json_member(root, "a"), cursor = {0}, name, value;
    const char kinds[] = "0\"{";
    int count = 0;
    for (; json_next(list, &cursor, &name, &value); count++)
        CHECK(json_kind(value) == kinds[count] && !name.text, "json: element %d is %c", count, json_kind(value));
    CHECK(count == 3, "json: %d elements, expected 3", count);
    CHECK(json_number(json_member(root, "n")) == -150, "json: number");
    CHECK(json_kind(json_member(root, "ab")) == 'n', "json: an escaped name");
    CHECK(json_number(json_member(root, "d")) == 2, "json: the last of two members counts");
    CHECK(json_kind(json_member(root, "none")) == 0 && json_kind(json_member(list, "a")) == 0, "json: absent");
    CHECK(isinf(json_number(json_of("-Infinity"))), "json: -Infinity");
    char *text = json_string(json_of("\"\\u00e9\\ud83d\\ude00\\n\\u0000/\\u20ac\""));
    CHECK(strcmp(text, "\xc3\xa9\xf0\x9f\x98\x80\n\xc0\x80/\xe2\x82\xac") == 0, "json: string %s", text);
    free(text);
}

static void test_config(void)
{
    config c = { .path = text_of("test"), .read = allocate(1, sizeof *c.read) };
    c.root = json_of("{\"i\":-3,\"x\":2.5,\"b\":true,\"s\":\"w\",\"l\":[1,2],\"n\":null,"
                     "\"w\":[\"a\",\"b\"],\"t\":\"('a', 'b',)\",\"e\":\"[]\",\"q\":\"( \\\"a\\\" )\"}");
    char *words[2];
    int64_t list[2];
    CHECK(config_int(c, "i", REQUIRED, -5, 5) == -3 && config_int(c, "n", 7, 0, 1) == 7, "config: int");
    CHECK(config_real(c, "x", NAN) == 2.5 && config_real(c, "i", NAN) == -3 && config_real(c, "no", 1) == 1,
        "config: real");
    CHECK(config_bool(c, "b", false) && config_bool(c, "n", true), "config: bool");
    CHECK(config_ints(c, "l", list, 2) == 2 && list[1] == 2 && config_ints(c, "n", list, 2) == -1, "config: ints");
    static const struct { const char *field; int count; } lists[] = {
        { "w", 2 }, { "t", 2 }, { "e", 0 }, { "q", 1 }, { "n", -1 },
    };
    for (int i = 0; i < 5; i++) {
        int count = config_words(c, lists[i].field, words, 2);
        CHECK(count == lists[i].count, "config: %s has %d words, expected %d", lists[i].field, count, lists[i].count);
        for (int k = 0; k < count; k++) {
            CHECK(words[k][0] == "ab"[k] && words[k][1] == 0, "config: %s, word %d is %s", lists[i].field, k, words[k]);
            free(words[k]);
        }
    }
    static const char *const no_lists[] = {
        "", "a", "(", "('a", "('a'", "('a' 'b')", "('a')x", "('a']", "(a)", "('a','b','c')",
    };
    for (size_t i = 0; i < sizeof no_lists / sizeof *no_lists; i++) {
        words[0] = words[1] = NULL;
        CHECK(python_words(no_lists[i], words, 2) < 0, "config: took the list %s", no_lists[i]);
        free(words[0]);
        free(words[1]);
    }
    free(c.path);
}

/* ---------------------------------------------------------------- safetensors */

/* A file in memory: length, header, and `data` zero bytes. To be freed. */
static unsigned char *st_bytes(const char *header, size_t data, size_t *size)
{
    size_t n = strlen(header);
    *size = 8 + n + data;
    unsigned char *bytes = allocate(*size, 1);
    for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)((uint64_t)n >> (8 * i));
    memcpy(bytes + 8, header, n);
    return bytes;
}

/* Parses a copy that ends where the bytes end, so that reading past them is seen by tools. */
static bool st_takes(const unsigned char *bytes, size_t size, char reason[REASON])
{
    unsigned char *exact = malloc(size ? size : 1);
    safetensors file;
    if (!exact) die(SYSTEM_ERROR, "memory: got none, expected %zu bytes; free some", size);
    if (size) memcpy(exact, bytes, size);
    bool taken = safetensors_parse(exact, size, &file, reason);
    if (taken) safetensors_free(&file);
    free(exact);
    return taken;
}

/* One tensor of a header. */
#define T(name, type, shape, offsets) \
    "\"" name "\":{\"dtype\":\"" type "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static const struct { const char *rule, *header; size_t data; } st_cases[] = {      /* rule NULL: valid */
    { NULL, "{}", 0 }, { NULL, " {} \n", 0 }, { NULL, "{\"__metadata__\":null}", 0 },
    { NULL, "{\"__metadata__\":{\"a\":\"b\"}}", 0 },
    { NULL, "{" T("a", "F32", "[2]", "[0,8]") "," T("b", "U8", "[]", "[8,9]") "}", 9 },
    { NULL, "{" T("b", "U8", "[1]", "[8,9]") "," T("a", "F32", "[2]", "[0,8]") "}", 9 },
    { NULL, "{" T("a", "F32", "[0,5]", "[0,0]") "," T("b", "U8", "[1]", "[0,1]") "," T("c", "C64", "[0]", "[1,1]") "}",
    1 },
    { NULL, "{" T("a", "F4", "[2,3]", "[0,3]") "," T("b", "F6_E2M3", "[4]", "[3,6]") "}", 6 },
    { NULL, "{" T("", "I8", "[1,1,1,1,1,1,1]", "[0,1]") "}", 1 }, 
    { NULL, "{" T("a\\u0000b", "I8", "[0]", "[0,0]") "," T("a\\u0000c", "I8", "[0]", "[0,0]") "}", 0 },
    { NULL, "{\"a\":{\"x\":{\"dtype\":[1e5]},\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1 },
    { NULL, "{" T("a", "U8", "[281474976710655,0]", "[0,0]") "}", 0 },
    { NULL, "{\"a\":{\"shape\":[ 0 ],\"data_offsets\":[ 0 , 0 ] ,\t\"\\u0064type\":\r\n\"U\\u0038\"}}", 0 },
    { NULL, "{\"__metadata__\":{},\"__metadata__x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}\t\r\n ", 1 },
    { "rule 4:", "{\"\xf4\x90\x80\x80\":1}", 0 }, { "rule 4:", "{}\xff", 0 },
    { "rule 4:", "{\"\xff\":1}", 0 }, { "rule 4:", "{\"\xc0\x80\":1}", 0 }, { "rule 4:", "{\"\xed\xa0\x80\":1}", 0 },
    { "rule 5:", "", 0 }, { "rule 5:", "[]", 0 }, { "rule 5:", "{}x", 0 }, { "rule 5:", "\xef\xbb\xbf{}", 0 },
    { "rule 5:", "{,}", 0 }, { "rule 5:", "{}{}", 0 }, { "rule 5:", "{} // no", 0 }, { "rule 5:", "\v{}", 0 },
    { "rule 5:", "{\"a\tb\":1}", 0 }, { "rule 5:", "{\"a\":NaN}", 0 }, { "rule 5:", "null", 0 }, { "rule 5:", "{\"a\":1", 0 },
    { "rule 5:", "{" T("a", "U8", "[+1]", "[0,1]") "}", 1 }, { "rule 5:", "{" T("a", "U8", "[1.]", "[0,1]") "}", 1 },
    { "rule 5:", "{" T("a", "U8", "[01]", "[0,1]") "}", 1 },
    { "rule 5:", "{" T("\\ud800", "U8", "[1]", "[0,1]") "}", 1 },
    { "rule 5:", "{" T("a", "U8", "[-Infinity]", "[0,1]") "}", 1 },
    { "rule 5:", "{" T("a", "U8", "[1]", "[0,1]") ",}", 1 },
    { "rule 6:", "{\"__metadata__\":{},\"__metadata__\":{}}", 0 }, { "rule 6:", "{\"__metadata__\":[]}", 0 },
    { "rule 6:", "{\"__metadata__\":{\"a\":1}}", 0 }, { "rule 6:", "{\"__metadata__\":\"a\"}", 0 },
    { "rule 6:", "{\"__metadata__\":{\"a\":null}}", 0 }, { "rule 6:", "{\"__metadata__\":{\"a\":{}}}", 0 },
    { "rule 6:", "{\"__metadata__\":null,\"__meta\\u0064ata__\":null}", 0 },
    { "rule 7:", "{\"a\":null}", 0 }, { "rule 7:", "{\"a\":[]}", 0 },
    { "rule 7:", "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,0]}}", 0 },
    { "rule 7:", "{\"a\":{\"shape\":[0],\"data_offsets\":[0,0]}}", 0 },
    { "rule 7:", "{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0],\"data_offsets\":[0,0]}}", 0 },
    { "rule 7:", "{\"a\":1}", 0 }, { "rule 7:", "{\"a\":{}}", 0 },
    { "rule 7:", "{\"a\":{\"dtype\":\"U8\",\"shape\":[0]}}", 0 },
    { "rule 7:", "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0 },
    { "rule 7:", "{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0],\"shape\":[0]}}", 0 },
    { "rule 8:", "{" T("a", "F16X", "[0]", "[0,0]") "}", 0 }, { "rule 8:", "{" T("a", "f32", "[0]", "[0,0]") "}", 0 },
    { "rule 8:", "{\"a\":{\"dtype\":1,\"shape\":[0],\"data_offsets\":[0,0]}}", 0 },
    { "rule 8:", "{" T("a", "", "[0]", "[0,0]") "}", 0 }, { "rule 8:", "{" T("a", "U8 ", "[0]", "[0,0]") "}", 0 },
    { "rule 9:", "{" T("a", "U8", "[[1]]", "[0,1]") "}", 1 }, { "rule 9:", "{" T("a", "U8", "[true]", "[0,1]") "}", 1 },
    { "rule 9:", "{" T("a", "U8", "[1]", "[-0,1]") "}", 1 }, { "rule 9:", "{" T("a", "U8", "[1]", "[\"0\",1]") "}", 1 },
    { "rule 9:", "{" T("a", "U8", "[1]", "[0,1e0]") "}", 1 },
    { "rule 9:", "{" T("a", "U8", "[1]", "[0,18446744073709551616]") "}", 1 },
    { "rule 9:", "{" T("a", "U8", "[1.0]", "[0,1]") "}", 1 }, { "rule 9:", "{" T("a", "U8", "[-1]", "[0,1]") "}", 1 },
    { "rule 9:", "{" T("a", "U8", "[\"1\"]", "[0,1]") "}", 1 },
    { "rule 9:", "{" T("a", "U8", "[1e0]", "[0,1]") "}", 1 },
    { "rule 9:", "{" T("a", "U8", "[18446744073709551616]", "[0,1]") "}", 1 },
    { "rule 9:", "{" T("a", "U8", "[-0]", "[0,0]") "}", 0 },
    { "rule 9:", "{" T("a", "U8", "[1]", "[0,1.0]") "}", 1 }, { "rule 9:", "{" T("a", "U8", "[null]", "[0,1]") "}", 1 },
    { "rule 10:", "{" T("a", "U8", "[1099511627776,1099511627776,0]", "[0,0]") "}", 0 },
    { "rule 10:", "{" T("a", "F6_E3M2", "[2]", "[0,1]") "}", 1 }, { "rule 10:", "{" T("a", "F4", "[]", "[0,0]") "}", 0 },
    { "rule 10:", "{" T("a", "U8", "null", "[0,1]") "}", 1 }, { "rule 10:", "{" T("a", "U8", "{}", "[0,1]") "}", 1 },
    { "rule 10:", "{" T("a", "U8", "1", "[0,1]") "}", 1 }, { "rule 10:", "{" T("a", "F4", "[3]", "[0,1]") "}", 1 },
    { "rule 10:", "{" T("a", "U8", "[4294967296,4294967296]", "[0,1]") "}", 1 },
    { "rule 10:", "{" T("a", "F64", "[4294967296,1073741824]", "[0,1]") "}", 1 },
    { "rule 11:", "{" T("a", "U8", "[0]", "[]") "}", 0 }, { "rule 11:", "{" T("a", "U8", "[0]", "{}") "}", 0 },
    { "rule 11:", "{" T("a", "U8", "[1]", "[18446744073709551615,0]") "}", 1 },
    { "rule 11:", "{" T("a", "U8", "[1]", "[0]") "}", 1 }, { "rule 11:", "{" T("a", "U8", "[1]", "[0,1,1]") "}", 1 },
    { "rule 11:", "{" T("a", "U8", "[1]", "1") "}", 1 }, { "rule 11:", "{" T("a", "U8", "[1]", "[1,0]") "}", 1 },
    { "rule 12:", "{" T("a", "U8", "[1]", "[1,2]") "}", 2 },
    { "rule 12:", "{" T("a", "U8", "[1]", "[0,1]") "," T("b", "U8", "[1]", "[2,3]") "}", 3 },
    { "rule 12:", "{" T("a", "U8", "[2]", "[0,2]") "," T("b", "U8", "[2]", "[1,3]") "}", 3 },
    { "rule 12:", "{" T("a", "U8", "[2]", "[0,2]") "," T("b", "U8", "[2]", "[0,2]") "}", 2 },
    { "rule 12:", "{" T("a", "U8", "[2]", "[0,2]") "," T("b", "U8", "[0]", "[1,1]") "}", 2 },
    { "rule 12:", "{" T("a", "U8", "[0]", "[1,1]") "}", 1 },
    { "rule 12:", "{" T("a", "U8", "[1]", "[18446744073709551614,18446744073709551615]") "}", 1 },
    { "rule 13:", "{" T("a", "C64", "[1]", "[0,4]") "}", 4 }, { "rule 13:", "{" T("a", "U8", "[]", "[0,0]") "}", 0 },
    { "rule 13:", "{" T("a", "F8_E8M0", "[2]", "[0,1]") "}", 1 }, { "rule 13:", "{" T("a", "F32", "[2]", "[0,9]") "}", 9 },
    { "rule 13:", "{" T("a", "F32", "[2]", "[0,4]") "}", 4 }, { "rule 13:", "{" T("a", "F32", "[0]", "[0,4]") "}", 4 },
    { "rule 13:", "{" T("a", "U8", "[1]", "[0,18446744073709551615]") "}", 1 },
    { "rule 14:", "{" T("a", "U8", "[2]", "[0,2]") "}", 1 }, { "rule 14:", "{" T("a", "U8", "[2]", "[0,2]") "}", 3 },
    { "rule 14:", "{}", 1 },
    { "rule 14:", "{" T("a", "U8", "[281474976710655]", "[0,281474976710655]") "}", 8 },
    { "rule S1:", "{" T("a", "U8", "[0]", "[0,0]") "," T("\\u0061", "U8", "[0]", "[0,0]") "}", 0 },
    { "rule S2:", "{" T("a", "U8", "[281474976710656]", "[0,281474976710656]") "}", 8 },
};

static void st_refused(const unsigned char *bytes, size_t size, const char *rule)
{
    char reason[REASON] = "";
    bool right = !st_takes(bytes, size, reason) && strncmp(reason, rule, strlen(rule)) == 0;
    CHECK(right, "safetensors: expected %s, got: %s", rule, reason);
}

static void test_safetensors_rules(void)
{
    char reason[REASON] = "";
    size_t size;
    for (size_t i = 0; i < sizeof st_cases / sizeof *st_cases; i++) {
        unsigned char *bytes = st_bytes(st_cases[i].header, st_cases[i].data, &size);
        if (st_cases[i].rule) st_refused(bytes, size, st_cases[i].rule);
        else CHECK(st_takes(bytes, size, reason), "safetensors: %s: %s", st_cases[i].header, reason);
        free(bytes);
    }
    for (size_t n = 0; n < 8; n++) st_refused((const unsigned char *)"\2\0\0\0\0\0\0", n, "rule 1:");
    st_refused(BYTES("\xff\xff\xff\xff\xff\xff\xff\xff{}"), "rule 2:");
    st_refused(BYTES("\x01\xe1\xf5\x05\0\0\0\0{}"), "rule 2:");
    st_refused(BYTES("\3\0\0\0\0\0\0\0{}"), "rule 3:");
    st_refused(BYTES("\x00\xe1\xf5\x05\0\0\0\0{}"), "rule 3:");    /* 100,000,000 is no too long header by itself */
    st_refused(BYTES("\3\0\0\0\0\0\0\0{}\0"), "rule 5:");
    for (int type = 0; type < DTYPES; type++)       /* 8 elements of every type, and a byte less */
        for (int missing = 0; missing < 2; missing++) {
            char *header = text_of("{" T("a", "%s", "[2,4]", "[0,%d]") "}", dtype_name[type], dtype_bits[type] - missing);
            unsigned char *bytes = st_bytes(header, (size_t)(dtype_bits[type] - missing), &size);
            if (missing) st_refused(bytes, size, "rule 13:");
            else CHECK(st_takes(bytes, size, reason), "safetensors: %s: %s", header, reason);
            free(bytes), free(header);
        }
    for (int levels = 126; levels <= 127; levels++) {   /* with the header's own two: 128, 129 */
        char deep[2 * 127 + 1] = "";
        memset(deep, '[', (size_t)levels), memset(deep + levels, ']', (size_t)levels);
        char *header = text_of("{\"a\":{\"x\":%.*s,\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 2 * levels, deep);
        unsigned char *bytes = st_bytes(header, 0, &size);
        if (levels > 126) st_refused(bytes, size, "rule 5:");
        else CHECK(st_takes(bytes, size, reason), "safetensors: %d levels: %s", levels, reason);
        free(bytes), free(header);
    }
}

/* Every prefix, and every file with one bit turned: refused with a rule, or taken, but nothing else. */
static void test_safetensors_damage(void)
{
    const char *header = "{\"__metadata__\":{\"k\":\"v\\u00e9\"},"
                         T("b", "F32", "[2,1]", "[2,10]") "," T("a", "BF16", "[]", "[0,2]") "}";
    char reason[REASON];
    size_t size;
    unsigned char *bytes = st_bytes(header, 10, &size);
    CHECK(st_takes(bytes, size, reason), "safetensors: %s", reason);
    for (size_t n = 0; n < size; n++)
        CHECK(!st_takes(bytes, n, reason) && strncmp(reason, "rule ", 5) == 0, "safetensors: took %zu of %zu bytes", n,
            size);
    for (size_t bit = 0; bit < 8 * size; bit++) {
        bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
        CHECK(st_takes(bytes, size, reason) || strncmp(reason, "rule ", 5) == 0, "safetensors: bit %zu: %s", bit,
            reason);
        bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
    safetensors file;
    CHECK(safetensors_parse(bytes, size, &file, reason), "safetensors: %s", reason);
    const st_tensor *a = safetensors_find(&file, "a"), *b = safetensors_find(&file, "b");
    CHECK(a && b && a == file.tensors && a->data + 2 == b->data && b->count == 2 && a->ndim == 0 && a->count == 1,
        "safetensors: layout");
    CHECK(b && b->ndim == 2 && b->dim[0] == 2, "safetensors: shape");
    CHECK(!safetensors_find(&file, "c") && !safetensors_find(&file, "__metadata__"),
        "safetensors: found what is not there");
    CHECK(json_kind(json_member(file.metadata, "k")) == '"', "safetensors: metadata");
    safetensors_free(&file);
    free(bytes);
}

/* What is written is read again, bit for bit, and leaves no temporary name behind. */
static void test_safetensors_write(void)
{
    char folder[] = "/tmp/ruyi-io-XXXXXX", *found = mkdtemp(folder), *path = text_of("%s/x.safetensors", folder);
    const double numbers[] = { 1.5, -2, 0.1 };
    const unsigned char bytes[] = { 1, 2, 3, 4, 5 };
    CHECK(found != NULL, "no folder in /tmp");
    if (!found) return;
    safetensors_write(path,
        (st_entry[]){ { "x", F64, SHAPE(3, 1), numbers }, { "y", U8, SHAPE(5), bytes }, { "z", I64, { 0 }, numbers } },
        3, true);
    safetensors *file = safetensors_open(path);
    const st_tensor *x = safetensors_find(file, "x"), *y = safetensors_find(file, "y"),
        *z = safetensors_find(file, "z");
    CHECK(x && y && z && x->ndim == 2 && z->ndim == 0, "safetensors: written tensors are missing");
    for (uint64_t i = 0; x && i < 3; i++) CHECK(element(x, i) == numbers[i], "safetensors: %g", element(x, i));
    for (uint64_t i = 0; y && i < 5; i++) CHECK(element(y, i) == bytes[i], "safetensors: %g", element(y, i));
    CHECK((file->size - 8 * 3 - 5 - 8) % 8 == 0, "safetensors: data is not aligned");
    safetensors_close(file);
    CHECK(unfinished == NULL && unlink(path) == 0 && rmdir(folder) == 0, "safetensors: something is left in %s",
        folder);
    free(path);
}

static void test_element(void)
{
    static const unsigned char bytes[] = { 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };
    static const struct { dtype type; double value; } cases[] = {
        { BOOL, 254 }, { U8, 254 }, { I8, -2 }, { I16, -2 }, { U16, 65534 }, { I32, -2 }, { U32, 4294967294.0 },
        { I64, -2 },
    };
    for (int i = 0; i < 8; i++) {
        st_tensor t = { .type = cases[i].type, .data = bytes };
        CHECK(element(&t, 0) == cases[i].value, "element: %s gives %g", dtype_name[t.type], element(&t, 0));
    }
}

/* ---------------------------------------------------------------- pictures */

static void ppm_good(const unsigned char *bytes, size_t size, int64_t w, int64_t h, const char *rgb, size_t rest)
{
    char reason[REASON] = "";
    size_t used = 0;
    image i;
    bool taken = ppm_parse(bytes, size, &used, &i, reason);
    CHECK(taken && i.w == w && i.h == h && used + rest == size, "ppm: %.12s: %s", (const char *)bytes, reason);
    if (taken) CHECK(memcmp(i.rgb, rgb, (size_t)(w * h * 3)) == 0, "ppm: %.12s: %d %d %d", (const char *)bytes,
        i.rgb[0], i.rgb[1], i.rgb[2]);
    free(i.rgb);
}

static void test_ppm(void)
{
    ppm_good(BYTES("P6\n2 1\n255\nabcdef"), 2, 1, "abcdef", 0);
    ppm_good(BYTES("P6\r1\t1\r\n255\r\nab"), 1, 1, "\nab", 0);      /* one white space after maxval, the next is data */
    ppm_good(BYTES("P3\n1 1 1\n1#c\n0\t1"), 1, 1, "\xff\x00\xff", 0);
    ppm_good(BYTES("P3 1 1 65535 65535 32768 0 P"), 1, 1, "\xff\x80\x00", 2);
    ppm_good(BYTES("P6 0002 00001 0255 abcdef"), 2, 1, "abcdef", 0);
    ppm_good(BYTES("P6 # one\n#two\n1#\n 1 255 abcP6"), 1, 1, "abc", 2);
    ppm_good(BYTES("P6\n1 1\n65535\n\xff\xff\x80\x00\x00\x80"), 1, 1, "\xff\x80\x00", 0);
    ppm_good(BYTES("P6\n1 1\n256\n\x01\x00\x00\x80\x00\x01"), 1, 1, "\xff\x80\x01", 0);
    ppm_good(BYTES("P6\n1 1\n3\n\x00\x01\x02"), 1, 1, "\x00\x55\xaa", 0);
    ppm_good(BYTES("P6\n1 1\n2\n\x00\x01\x02"), 1, 1, "\x00\x80\xff", 0);
    ppm_good(BYTES("P3\n1 2 15\n0 15 7\n#c\n1 2 3\n"), 1, 2, "\x00\xff\x77\x11\x22\x33", 1);
    ppm_good(BYTES("P3 1 1 255 0 0 255"), 1, 1, "\x00\x00\xff", 0);
    ppm_good(BYTES("P5\n2 1 255\nab"), 2, 1, "aaabbb", 0);
    ppm_good(BYTES("P5\n1 1 1000\n\x03\xe8"), 1, 1, "\xff\xff\xff", 0);
    static const struct { const unsigned char *bytes; size_t size; } bad[] = {
        { BYTES("") }, { BYTES("P") }, { BYTES("P7\n") }, { BYTES("P2\n1 1 255 0") }, { BYTES("P61 1 255 abc") },
        { BYTES("P6\n0 1 255\n") }, { BYTES("P6\n1 0 255\nabc") }, { BYTES("p6\n1 1 255\nabc") }, { BYTES(" P6\n1 1 255\nabc") },
        { BYTES("P6\n1 1 +255\nabc") }, { BYTES("P6\n1 1 0x1\nabc") }, { BYTES("P6\n1.0 1 255\nabc") }, { BYTES("P6\n1\0001 255\nabc") },
        { BYTES("P6\n1 1 65535\nabcde") },
        { BYTES("P5\n1 1 7\n\x08") }, { BYTES("P5\n1 1 65535\na") },
        { BYTES("P6\n1 1 0\nabc") }, { BYTES("P6\n1 1 65536\nabcabc") }, { BYTES("P6\n1 1 255\nab") },
        { BYTES("P6\n1 1 255") }, { BYTES("P6\n1 -1 255\nabc") },
        { BYTES("P6\n1 1 96\nabc") }, { BYTES("P6\n2147483647 2147483647 65535\n") },
        { BYTES("P6\n99999999999999999999 1 255\nabc") },
        { BYTES("P3 1 1 255 1 2") }, { BYTES("P3 1 1 255 1 2 256") }, { BYTES("P3 1 1 255 1 2 x") },
        { BYTES("P3 1 1 255 1 2 -3") },
        { BYTES("P6\n1 1 300\n\x01\x2d\x00\x00\x00\x00") }, { BYTES("P6\n# no end") }, { BYTES("P5\n3 1 255\nab") },
        { BYTES("P6\n1 1 255#\nabc") },
    };
    char reason[REASON];
    size_t used;
    image i;
    for (size_t k = 0; k < sizeof bad / sizeof *bad; k++)
        CHECK(!ppm_parse(bad[k].bytes, bad[k].size, &used, &i, reason) && !i.rgb, "ppm: took %.20s",
            (const char *)bad[k].bytes);
}

/* Reference values: exact arithmetic on the definition, halves up. */
static void test_y4m(void)
{
    static const struct { unsigned char rgb[3], yuv[3]; } colours[] = {
        { { 0, 0, 0 }, { 0, 128, 128 } }, { { 255, 255, 255 }, { 255, 128, 128 } }, { { 255, 0, 0 }, { 76, 85, 255 } },
        { { 0, 255, 0 }, { 150, 44, 21 } }, { { 0, 0, 255 }, { 29, 255, 107 } },
        { { 128, 128, 128 }, { 128, 128, 128 } },
        { { 255, 255, 0 }, { 226, 1, 149 } }, { { 0, 255, 255 }, { 179, 171, 1 } },
        { { 255, 0, 255 }, { 105, 212, 235 } },
    };
    unsigned char rgb[3 * 3 * 3], planes[9 + 4 + 4];
    for (size_t i = 0; i < sizeof colours / sizeof *colours; i++) {
        for (int k = 0; k < 9; k++) memcpy(rgb + 3 * k, colours[i].rgb, 3);
        y4m_planes(rgb, 3, 3, planes);
        for (int k = 0; k < 17; k++) {
            int expected = colours[i].yuv[k < 9 ? 0 : k < 13 ? 1 : 2];
            CHECK(planes[k] == expected, "y4m: colour %zu, byte %d: got %d, expected %d", i, k, planes[k], expected);
        }
    }
    /* black, red / black, black beside white: the mean is taken before rounding, and the odd column is repeated */
    static const unsigned char mixed[] = { 0, 0, 0, 255, 0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 0, 0, 255 };
    y4m_planes(mixed, 3, 2, planes);
    CHECK(planes[6] == 117 && planes[8] == 160 && planes[7] == 255 && planes[9] == 107, "y4m: %d %d %d %d", planes[6],
        planes[8], planes[7], planes[9]);
}

/* One stream of one frame: its first pixel, or NULL for a refusal in the header, "" for one in the frame. */
static void y4m_case(const unsigned char *bytes, size_t size, const char *first, size_t rest)
{
    char reason[REASON] = "";
    size_t used = 0, more = 0;
    y4m head;
    image i = { 0 };
    bool opened = y4m_header(bytes, size, &used, &head, reason);
    CHECK(opened == (first != NULL) && used <= size, "y4m: %.40s: %s", (const char *)bytes, reason);
    if (!opened || !first) return;
    bool taken = y4m_parse(&head, bytes + used, size - used, &more, &i, reason);
    CHECK(taken == (*first || rest != SIZE_MAX) && (!taken || used + more + rest == size), "y4m: %.40s: %s",
        (const char *)bytes, reason);
    CHECK(taken == (i.rgb != NULL) && (!taken || memcmp(i.rgb, first, 3) == 0), "y4m: %.40s: another pixel",
        (const char *)bytes);
    free(i.rgb);
}

/* Full and limited range, every grid of chroma, odd sides, parameters of frames; and what is none. */
static void test_y4m_in(void)
{
    y4m_case(BYTES("YUV4MPEG2 W1 H1 XCOLORRANGE=FULL\nFRAME\n\x4c\x55\xff"), "\xfe\x00\x00", 0);
    y4m_case(BYTES("YUV4MPEG2 W1 H1\nFRAME\n\x10\x80\x80"), "\x00\x00\x00", 0);
    y4m_case(BYTES("YUV4MPEG2 W1 H1 C420mpeg2 Ip A1:1 F25:1 XYSCSS=420\nFRAME\n\xeb\x80\x80"), "\xff\xff\xff", 0);
    y4m_case(BYTES("YUV4MPEG2 H1  W1 C420paldv XCOLORRANGE=LIMITED\nFRAME\n\x00\x80\x80"), "\x00\x00\x00", 0);
    y4m_case(BYTES("YUV4MPEG2 W3 H1 C420jpeg\nFRAME Ip\n\xff\x10\x10\x80\x80\x80\x80" "FRAME"), "\xff\xff\xff", 5);
    y4m_case(BYTES("YUV4MPEG2 W3 H3 C422\nFRAME\n\x51........\x5a.....\xf0....."), "\xfe\x00\x00", 0);
    y4m_case(BYTES("YUV4MPEG2 W1 H2 C444\nFRAME\n\x29.\xf0.\x6e."), "\x00\x00\xff", 0);
    y4m_case(BYTES("YUV4MPEG2 W2 H1 Cmono\nFRAME\n\x07\x08"), "\x07\x07\x07", 0);
    static const struct { const unsigned char *bytes; size_t size; const char *frame; } bad[] = {
        { BYTES(""), NULL }, { BYTES("YUV4MPEG"), NULL }, { BYTES("YUV4MPEG2 W1 H1"), NULL }, { BYTES("YUV4MPEG2\n"), NULL },
        { BYTES("YUV4MPEG2 W1\nFRAME\n"), NULL }, { BYTES("YUV4MPEG2 W0 H1\n"), NULL }, { BYTES("YUV4MPEG2 W-1 H1\n"), NULL },
        { BYTES("YUV4MPEG2 W H1\n"), NULL }, { BYTES("YUV4MPEG2 W2147483648 H1\n"), NULL },
        { BYTES("YUV4MPEG2 W99999999999999999999999 H1\n"), NULL }, { BYTES("YUV4MPEG2 W1 H1 C420p10\n"), NULL },
        { BYTES("YUV4MPEG2 W1 H1 C411\n"), NULL }, { BYTES("YUV4MPEG2 W1 H1 C444alpha\n"), NULL },
        { BYTES("YUV4MPEG2 W1 H1 It\n"), NULL }, { BYTES("YUV4MPEG2W1 H1\n"), NULL },
        { BYTES("YUV4MPEG2 W1 H1\n"), "" }, { BYTES("YUV4MPEG2 W1 H1\nFRAME\nab"), "" },
        { BYTES("YUV4MPEG2 W1 H1\nFRAMES\nabc"), "" }, { BYTES("YUV4MPEG2 W1 H1\nFRAME"), "" },
        { BYTES("YUV4MPEG2 W1 H1\nFRAM\nabc"), "" },
        { BYTES("YUV4MPEG2 W999999999 H999999999 C444\nFRAME\nabc"), "" },
    };
    for (size_t k = 0; k < sizeof bad / sizeof *bad; k++) y4m_case(bad[k].bytes, bad[k].size, bad[k].frame, SIZE_MAX);
    static const struct { const char *text; int64_t first, last; } choices[] = {
        { "7", 7, 7 }, { "-1", -1, -1 }, { "0..4", 0, 4 }, { "-5..", -5, -1 }, { "..4", 0, 4 }, { "-5..-2", -5, -2 },
    };
    int64_t a, b;
    for (size_t k = 0; k < sizeof choices / sizeof *choices; k++)
        CHECK(frames_parse(choices[k].text, &a, &b) && a == choices[k].first && b == choices[k].last, "frames: %s",
            choices[k].text);
    static const char *const none[] = { "", "..", "x", "1.4", "1...4", "1..x", " 1", "1 ", "1..2..3", "-", "12345678901" };
    a = 7, b = 9;                   /* images_read tries a name's end, and goes on with its own choice where it is none */
    for (size_t k = 0; k < sizeof none / sizeof *none; k++)
        CHECK(!frames_parse(none[k], &a, &b) && a == 7 && b == 9, "frames: took '%s'", none[k]);
}

/* What y4m_planes wrote comes back, and gives the same planes again; colours near grey are not cut to 0..255. */
static void test_y4m_round_trip(void)
{
    enum { W = 33, H = 17, SIZE = W * H + 2 * 17 * 9 };
    static unsigned char rgb[3 * W * H], planes[SIZE], stream[SIZE + 6] = "FRAME\n";
    const y4m head = { W, H, 2, 2, true };
    char reason[REASON];
    size_t used;
    image i;
    for (uint32_t k = 0, state = 1; k < sizeof rgb; k++) {
        state = state * 1664525 + 1013904223;
        rgb[k] = (unsigned char)(96 + (state >> 24) % 64);
    }
    y4m_planes(rgb, W, H, stream + 6);
    CHECK(y4m_parse(&head, stream, sizeof stream, &used, &i, reason) && used == sizeof stream, "y4m: round trip: %s", reason);
    y4m_planes(i.rgb, W, H, planes);
    for (size_t k = 0; k < SIZE; k++)
        CHECK(planes[k] == stream[6 + k], "y4m: round trip: byte %zu: %d, was %d", k, planes[k], stream[6 + k]);
    free(i.rgb);
}

static image image_of(const st_tensor *t)
{
    return (image){ t->dim[1], t->dim[0], (unsigned char *)(uintptr_t)t->data };
}

/* Against Pillow's own results: every pair NN.in, NN.out. */
static void test_resize(void)
{
    safetensors *file = safetensors_open("tests/golden/ops/resize.safetensors");
    int cases = 0;
    for (;; cases++) {
        char *name_in = text_of("%02d.in", cases), *name_out = text_of("%02d.out", cases);
        const st_tensor *in = safetensors_find(file, name_in), *out = safetensors_find(file, name_out);
        free(name_in);
        free(name_out);
        if (!in || !out) break;
        image got = image_resize(image_of(in), out->dim[1], out->dim[0]);
        CHECK(memcmp(got.rgb, out->data, out->bytes) == 0, "resize: case %d differs", cases);
        free(got.rgb);
    }
    CHECK(cases == 14, "resize: %d cases, expected 14", cases);
    safetensors_close(file);
}

/* The shortest edge to S, the other int(S * long / short), then the centre. */
static void test_crops(void)
{
    safetensors *file = safetensors_open("tests/golden/ops/clip_preprocess.safetensors");
    int cases = 0;
    for (;; cases++) {
        char *name_in = text_of("%02d.in", cases), *name_out = text_of("%02d.crop", cases);
        const st_tensor *in = safetensors_find(file, name_in), *crop = safetensors_find(file, name_out);
        free(name_in);
        free(name_out);
        if (!in || !crop) break;
        image picture = image_of(in);
        int64_t side = crop->dim[0], least = lesser(picture.w, picture.h);
        image got = image_resize(picture, side * picture.w / least, side * picture.h / least);
        int64_t left = (got.w - side) / 2, top = (got.h - side) / 2, differing = 0;
        for (int64_t y = 0; y < side; y++)
            differing += memcmp(got.rgb + ((top + y) * got.w + left) * 3, crop->data + y * side * 3,
                (size_t)side * 3) != 0;
        CHECK(differing == 0, "crop: case %d differs in %d rows", cases, (int)differing);
        free(got.rgb);
    }
    CHECK(cases == 8, "crop: %d cases, expected 8", cases);
    safetensors_close(file);
}

/* ---------------------------------------------------------------- words, names, stages */

static void test_words(void)
{
    static const char *const words[] = { "generate", "encode", "decode", "compare", "info" };
    static const struct { const char *word; int nearest; } cases[] = {
        { "generat", 0 }, { "genreate", 0 }, { "encod", 1 }, { "dceode", 2 }, { "cmopare", 3 }, { "inof", 4 },
        { "", 4 }, { "decode", 2 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *nearest = nearest_word(cases[i].word, words, 5);
        CHECK(nearest == words[cases[i].nearest], "nearest: %s gives %s", cases[i].word, nearest);
    }
    CHECK(nearest_word("x", words, 0) == NULL, "nearest: of none");
    CHECK(edit_distance("kitten", "sitting") == 3 && edit_distance("ab", "ba") == 1 &&
        edit_distance("", "abc") == 3, "distances");
    const struct { const char *path; bool good; } patterns[] = {
        { "%d", true }, { "a-%04d.b", true }, { "%018d", true }, { "%4d", false }, { "%00d", false }, { "%s", false },
        { "%%d", false }, { "%d%d", false }, { "x", false }, { "%", false }, { "%0", false }, { "%0123d", false },
        { "%d%%", false }, { "%ld", false },
    };
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        char *name = series_name(patterns[i].path, 0);
        CHECK((name != NULL) == patterns[i].good, "pattern: %s", patterns[i].path);
        free(name);
    }
}

static void test_stages(void)
{
    static const char *const order[] = {
        "pixels", "mask", "clip.pixels", "clip.embed", "clip.layer.00", "clip.layer.01", "clip.hidden", "mask_latents",
        "masked_latents", "noise", "timesteps", "step.000.temb", "step.000.text", "step.000.image", "step.000.patch",
        "step.000.block.00.time", "step.000.block.00.norm1", "step.000.block.00.attn1", "step.000.block.00.attn2",
        "step.000.block.00.clip", "step.000.block.00.ff", "step.000.block.00", "step.000.block.03.skip",
        "step.000.block.03", "step.000.block.10.ff", "step.000.block.10", "step.000.norm_out", "step.000.out",
        "step.000.pred", "step.000.latents", "step.001.temb", "step.010.temb", "step.1000.temb", "teacache.computed",
        "teacache.delta", "vae.enc.conv_in.s00", "vae.enc.conv_in.s01", "vae.enc.down.0.s00", "vae.enc.mid.s00",
        "vae.enc.out.s00", "vae.moments", "vae.dec.conv_in.s00", "vae.dec.mid.s00", "vae.dec.up.0.s00",
        "vae.dec.up.3.s00", "vae.dec.out.s00", "decoded", "video", "frames", "unknown", "unknown-er", "unknown.x",
        "unknowner",
    };
    int count = sizeof order / sizeof *order;
    for (int i = 0; i < count; i++)
        for (int j = 0; j < count; j++) {
            st_tensor s = { .name = (char *)(uintptr_t)order[i] }, t = { .name = (char *)(uintptr_t)order[j] };
            int sign = by_stage(&(const st_tensor *){ &s }, &(const st_tensor *){ &t });
            bool unknown = order[i][0] == 'u' && order[j][0] == 'u';    /* any order of these, as long as it is one */
            CHECK(unknown ? (sign == 0) == (i == j) : (sign > 0) - (sign < 0) == (i > j) - (i < j),
                "order of %s and %s", order[i], order[j]);
        }
}

/* A picture's PNG in base64, byte for byte as other programs' zlib, CRC and base64 make it; and text that is no HTML. */
static void test_pages(void)
{
    static const char png[] = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAGUlEQVR4AQEOAPH/AAECA/+"
                              "AAAAJCAcAAEAPhAHewAfv4gAAAABJRU5ErkJggg==";
    unsigned char rgb[] = { 1, 2, 3, 255, 128, 0, 9, 8, 7, 0, 0, 64 };
    string p = { 0 };
    print_picture(&p, (image){ 2, 2, rgb });
    CHECK(p.length == strlen(png) && memcmp(p.text, png, p.length) == 0, "page: picture: %.*s", (int)p.length, p.text);
    size_t before = p.length;
    print_to(&p, "%d%%", 7);
    print_html(&p, "a<b>&\"c");
    CHECK(p.length - before == 21 && memcmp(p.text + before, "7%a&lt;b>&amp;&quot;c", 21) == 0, "page: text: %.*s",
          (int)(p.length - before), p.text + before);
    free(p.text);
}

static void test_io(void)
{
    test_pages();
    test_json_grammar();
    test_json_values();
    test_config();
    test_safetensors_rules();
    test_safetensors_damage();
    test_safetensors_write();
    test_element();
    test_ppm();
    test_y4m();
    test_y4m_in();
    test_y4m_round_trip();
    test_resize();
    test_crops();
    test_words();
    test_stages();
}
