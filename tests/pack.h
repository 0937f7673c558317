/* pack.h - metadata of safetensors files, for the tools that make the golden pack. Needs io.c included. */
#ifndef PACK_H
#define PACK_H

/* *list = [*list, ]text. */
static void append(char **list, const char *separator, const char *format, ...) PRINTF(3, 4);
static void append(char **list, const char *separator, const char *format, ...)
{
    FORMATTED(text, format);
    char *before = *list;
    *list = before ? text_of("%s%s%s", before, separator, text) : text_of("%s", text);
    free(text);
    free(before);
}

/* JSON text as a JSON string. Tests' own words and numbers: nothing but quotes needs escaping. */
static char *quoted(const char *text)
{
    char *out = allocate(2 * strlen(text) + 3, 1), *to = out;
    for (*to++ = '"'; *text; *to++ = *text++)
        if (*text == '"' || *text == '\\')
            *to++ = '\\';
    *to = '"';
    return out;
}

/* The header of a parsed file, a JSON object. */
static json header_of(const safetensors *f)
{
    char reason[REASON];
    json root;
    if (!json_check((const char *)f->map + 8, (size_t)load64(f->map), false, &root, reason))
        die(BAD_INPUT, "%s: header: %s; make the file again", f->path, reason);
    return root;
}

/* Gives the file other metadata (members of a JSON object of strings); its tensors' bytes stay as they are. */
static void set_metadata(const char *path, const char *members)
{
    safetensors *f = safetensors_open(path);
    size_t begin = 8 + (size_t)load64(f->map), size;
    char *list = text_of("\"__metadata__\":{%s}", members), *text;
    for (json at = { 0 }, name, value; json_next(header_of(f), &at, &name, &value);)
        if (!json_is(name, "__metadata__"))
            append(&list, ",", "%.*s:%.*s", (int)(name.end - name.text), name.text, (int)(value.end - value.text), value.text);
    text = text_of("........{%s}       ", list);
    size = strlen(text) & ~(size_t)7;           /* the brace, and spaces up to a multiple of 8 */
    for (int i = 0; i < 8; i++)
        text[i] = (char)(unsigned char)((uint64_t)(size - 8) >> (8 * i));
    writer *w = writer_open(path);
    put(w->fd, path, text, size);
    put(w->fd, path, f->map + begin, f->size - begin);
    writer_finish(w, false);
    writer_rename(w);
    safetensors_close(f);
    free(list);
    free(text);
}

#endif
