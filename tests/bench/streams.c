/* The two ends of tests/bench/door.py: an engine that sends tokens when they are due, to the
 * microsecond, and a client that says how late each came.  One epoll loop each.
 *
 *   llama-server -m FILE --alias NAME --host H --port P …     plays llama.cpp's server
 *   OLLAMA_HOST=H:P ollama serve                              plays Ollama with one model, bench:latest
 *   streams first  KEY=VALUE …       requests for one token, one at a time: nanoseconds to the token
 *   streams many   KEY=VALUE …       n streams at once: how late the tokens came
 * KEY: host port path token model; ndjson=1 for Ollama's dialect; first: count, kept=1; many: n tokens
 * rate limit_s, slow and leave (percent of the streams that read slowly, and that leave half way).
 *
 * What an answer holds stands in the prompt: "tokens=150 rate=50 pad=0", so that it comes through every
 * proxy.  Each token is "@" and the time at which it was due, in nanoseconds of CLOCK_MONOTONIC.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MOST 8192             /* connections; a descriptor is the index */
#define HEAD_MOST (1 << 17)   /* of a request, with its body */

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void die(const char *what) { perror(what); exit(1); }

static int set_up(int descriptor) {
    int one = 1;
    setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fcntl(descriptor, F_SETFL, O_NONBLOCK);
}

static struct sockaddr_in address_of(const char *host, int port) {
    struct sockaddr_in place = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (inet_pton(AF_INET, !strcmp(host, "localhost") ? "127.0.0.1" : host, &place.sin_addr) != 1)
        die(host);
    return place;
}

/* epoll_wait() to the nanosecond; until < 0 waits for ever. */
static int wait_until(int poll, struct epoll_event *events, int most, int64_t until) {
    int64_t left = until - now_ns();
    if (left < 0) left = 0;
    struct timespec limit = {left / 1000000000, left % 1000000000};
    int count = syscall(SYS_epoll_pwait2, poll, events, most, until < 0 ? NULL : &limit, NULL, 0);
    if (count < 0 && errno == ENOSYS)
        count = epoll_wait(poll, events, most, until < 0 ? -1 : (int)(left / 1000000));
    if (count < 0 && errno != EINTR) die("epoll");
    return count < 0 ? 0 : count;
}

static void all_descriptors(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max < MOST ? limit.rlim_max : MOST;
    setrlimit(RLIMIT_NOFILE, &limit);
    prctl(PR_SET_TIMERSLACK, 1000ul);
    signal(SIGPIPE, SIG_IGN);
}

/* ---- a heap of what is due: descriptors by their time -------------------------------------- */

static int heap[MOST], heap_size, heap_at[MOST];
static int64_t due[MOST];

static void heap_put(int at, int who) { heap[at] = who; heap_at[who] = at; }

static void heap_move(int at) {
    int who = heap[at];
    while (at && due[heap[(at - 1) / 2]] > due[who]) {
        heap_put(at, heap[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    for (int child; (child = 2 * at + 1) < heap_size; at = child) {
        if (child + 1 < heap_size && due[heap[child + 1]] < due[heap[child]]) child++;
        if (due[heap[child]] >= due[who]) break;
        heap_put(at, heap[child]);
    }
    heap_put(at, who);
}

static void heap_set(int who, int64_t when) {
    due[who] = when;
    if (heap_at[who] < 0) { heap_put(heap_size, who); heap_size++; }
    heap_move(heap_at[who]);
}

static void heap_drop(int who) {
    int at = heap_at[who];
    if (at < 0) return;
    heap_at[who] = -1;
    int last = heap[--heap_size];
    if (last != who) { heap_put(at, last); heap_move(at); }
}

/* ---- the engine ----------------------------------------------------------------------------- */

enum dialect { CHAT, COMPLETIONS, OLLAMA_CHAT, OLLAMA_GENERATE };

typedef struct {
    char *in, *out;
    int in_len;
    size_t out_len, out_most;
    enum dialect dialect;
    int streaming, tokens, sent, pad, close, usage, watching;
    int64_t period;
} link_t;

static link_t links[MOST];
static int engine_poll;
static char alias[256] = "bench";
static int64_t total_tokens, total_requests, total_left;
static char padding[65537];

static void drop(int who) {
    link_t *link = &links[who];
    if (link->streaming) total_left++;
    heap_drop(who);
    link->in_len = link->streaming = link->watching = 0;
    link->out_len = 0;
    close(who);
}

static void watch(int who, int writable) {
    if (links[who].watching == writable) return;
    links[who].watching = writable;
    struct epoll_event event = {.events = EPOLLIN | (writable ? EPOLLOUT : 0), .data.fd = who};
    epoll_ctl(engine_poll, EPOLL_CTL_MOD, who, &event);
}

static int say(int who, const char *raw, size_t size) {
    link_t *link = &links[who];
    if (!link->out_len) {
        ssize_t gone = send(who, raw, size, MSG_NOSIGNAL);
        if (gone < 0 && errno != EAGAIN) return -1;
        if (gone > 0) { raw += gone; size -= gone; }
        if (!size) return 0;
    }
    if (link->out_len + size > link->out_most) {
        link->out_most = (link->out_len + size) * 2;
        link->out = realloc(link->out, link->out_most);
    }
    memcpy(link->out + link->out_len, raw, size);
    link->out_len += size;
    watch(who, 1);
    return 0;
}

static int flush_out(int who) {
    link_t *link = &links[who];
    ssize_t gone = send(who, link->out, link->out_len, MSG_NOSIGNAL);
    if (gone < 0) return errno == EAGAIN ? 0 : -1;
    memmove(link->out, link->out + gone, link->out_len - gone);
    link->out_len -= gone;
    if (!link->out_len) watch(who, 0);
    return 0;
}

static int answer(int who, int status, const char *kind, const char *body) {
    static char raw[1 << 18];
    int size = snprintf(raw, sizeof raw, "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\n%s\r\n%s",
                        status, status == 200 ? "OK" : "Not Found", kind, strlen(body),
                        links[who].close ? "Connection: close\r\n" : "", body);
    return say(who, raw, size);
}

/* One event of a stream, as its dialect has it; text NULL: the end. */
static int event_text(char *to, int most, link_t *link, const char *text) {
    const char *last = text ? "null" : "\"stop\"";
    switch (link->dialect) {
    case CHAT:
        return snprintf(to, most, "data: {\"choices\":[{\"finish_reason\":%s,\"index\":0,\"delta\":{%s%s%s%s}}],"
                        "\"created\":1790000000,\"id\":\"chatcmpl-b9\",\"model\":\"%s\","
                        "\"system_fingerprint\":\"b10488\",\"object\":\"chat.completion.chunk\"}\n\n", last,
                        text && !link->sent ? "\"role\":\"assistant\"," : "", text ? "\"content\":\"" : "",
                        text ? text : "", text ? "\"" : "", alias);
    case COMPLETIONS:
        return snprintf(to, most, "data: {\"choices\":[{\"text\":\"%s\",\"index\":0,\"logprobs\":null,"
                        "\"finish_reason\":%s}],\"created\":1790000000,\"model\":\"%s\","
                        "\"object\":\"text_completion\",\"id\":\"cmpl-b9\"}\n\n", text ? text : "", last, alias);
    default:
        return snprintf(to, most, link->dialect == OLLAMA_CHAT
                        ? "{\"model\":\"%s\",\"created_at\":\"2026-11-21T12:00:00.123456789Z\",\"message\":"
                          "{\"role\":\"assistant\",\"content\":\"%s\"},\"done\":%s"
                        : "{\"model\":\"%s\",\"created_at\":\"2026-11-21T12:00:00.123456789Z\",\"response\":"
                          "\"%s\",\"done\":%s", alias, text ? text : "", text ? "false}\n" : "true");
    }
}

static int end_text(char *to, int most, link_t *link) {
    int size = event_text(to, most, link, NULL);
    if (link->dialect >= OLLAMA_CHAT)
        return size + snprintf(to + size, most - size, ",\"done_reason\":\"stop\",\"total_duration\":1000000,"
                               "\"load_duration\":1000,\"prompt_eval_count\":7,\"prompt_eval_duration\":1000,"
                               "\"eval_count\":%d,\"eval_duration\":1000000}\n", link->sent);
    if (link->usage)
        size += snprintf(to + size, most - size, "data: {\"choices\":[],\"created\":1790000000,\"id\":"
                         "\"chatcmpl-b9\",\"model\":\"%s\",\"object\":\"chat.completion.chunk\",\"usage\":"
                         "{\"completion_tokens\":%d,\"prompt_tokens\":7,\"total_tokens\":%d}}\n\n", alias,
                         link->sent, link->sent + 7);
    return size + snprintf(to + size, most - size, "data: [DONE]\n\n");
}

/* The token that is due now, and after the last one the end. */
static int send_token(int who) {
    static char text[70000], event[75000], raw[90000];
    link_t *link = &links[who];
    snprintf(text, sizeof text, "@%lld %.*s", (long long)due[who], link->pad, padding);
    int size = event_text(event, sizeof event, link, text);
    int whole = snprintf(raw, sizeof raw, "%x\r\n%s\r\n", size, event);
    link->sent++;
    total_tokens++;
    if (link->sent >= link->tokens) {
        size = end_text(event, sizeof event, link);
        whole += snprintf(raw + whole, sizeof raw - whole, "%x\r\n%s\r\n0\r\n\r\n", size, event);
        link->streaming = 0;
        heap_drop(who);
    } else
        heap_set(who, due[who] + link->period);
    return say(who, raw, whole);
}

static int number_after(const char *body, const char *word, int other) {
    const char *at = strstr(body, word);
    return at ? atoi(at + strlen(word)) : other;
}

static int field(const char *body, const char *name, int other) {
    const char *at = strstr(body, name);
    if (!at) return other;
    at += strlen(name);
    while (*at == ' ' || *at == ':') at++;
    return *at == 't' ? 1 : *at == 'f' ? 0 : atoi(at);
}

static int generate(int who, enum dialect dialect, const char *body) {
    link_t *link = &links[who];
    total_requests++;
    link->dialect = dialect;
    link->sent = 0;
    int most = field(body, dialect >= OLLAMA_CHAT ? "\"num_predict\"" : "\"max_tokens\"", 8);
    link->tokens = number_after(body, "tokens=", most);
    if (most > 0 && link->tokens > most && strstr(body, "\"max_tokens\"")) link->tokens = most;
    if (link->tokens < 1) link->tokens = 1;
    int rate = number_after(body, "rate=", 0);
    link->period = rate ? 1000000000ll / rate : 0;
    link->pad = number_after(body, "pad=", 0) & 65535;
    link->usage = field(body, "\"include_usage\"", 0);
    if (field(body, "\"stream\"", dialect >= OLLAMA_CHAT)) {
        char head[200];
        snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n",
                 dialect >= OLLAMA_CHAT ? "application/x-ndjson" : "text/event-stream");
        link->streaming = 1;
        heap_set(who, now_ns());
        return say(who, head, strlen(head));
    }
    static char text[1 << 18];
    total_tokens += link->tokens;
    link->sent = link->tokens;
    if (dialect >= OLLAMA_CHAT) {
        event_text(text, sizeof text, link, NULL);
        return answer(who, 200, "application/json", (end_text(text, sizeof text, link), text));
    }
    snprintf(text, sizeof text, "{\"id\":\"b9\",\"object\":\"%s\",\"created\":1790000000,\"model\":\"%s\","
             "\"choices\":[{\"index\":0,%s,\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":7,"
             "\"completion_tokens\":%d,\"total_tokens\":%d}}", dialect == CHAT ? "chat.completion" :
             "text_completion", alias, dialect == CHAT ? "\"message\":{\"role\":\"assistant\",\"content\":\"Hi\"}"
             : "\"text\":\"Hi\"", link->tokens, link->tokens + 7);
    return answer(who, 200, "application/json", text);
}

static int serve(int who, const char *path, const char *body) {
    static char text[4000];
    const char *json = "application/json";
    if (!strcmp(path, "/v1/chat/completions")) return generate(who, CHAT, body);
    if (!strcmp(path, "/v1/completions")) return generate(who, COMPLETIONS, body);
    if (!strcmp(path, "/api/chat")) return generate(who, OLLAMA_CHAT, body);
    if (!strcmp(path, "/api/generate")) return generate(who, OLLAMA_GENERATE, body);
    if (!strcmp(path, "/health")) return answer(who, 200, json, "{\"status\":\"ok\"}");
    if (!strcmp(path, "/")) return answer(who, 200, "text/plain", "Ollama is running");
    if (!strcmp(path, "/api/version")) return answer(who, 200, json, "{\"version\":\"0.33.0\"}");
    if (!strcmp(path, "/stats"))
        snprintf(text, sizeof text, "{\"requests\":%lld,\"tokens\":%lld,\"left\":%lld}",
                 (long long)total_requests, (long long)total_tokens, (long long)total_left);
    else if (!strcmp(path, "/metrics")) {
        snprintf(text, sizeof text, "# TYPE llamacpp:tokens_predicted_total counter\n"
                 "llamacpp:tokens_predicted_total %lld\n# TYPE llamacpp:requests_deferred gauge\n"
                 "llamacpp:requests_deferred 0\n", (long long)total_tokens);
        json = "text/plain; version=0.0.4";
    } else if (!strcmp(path, "/v1/models"))
        snprintf(text, sizeof text, "{\"object\":\"list\",\"data\":[{\"id\":\"%s\",\"object\":\"model\","
                 "\"created\":1790000000,\"owned_by\":\"llamacpp\"}]}", alias);
    else if (!strcmp(path, "/api/tags") || !strcmp(path, "/api/ps"))
        snprintf(text, sizeof text, "{\"models\":[{\"name\":\"%s\",\"model\":\"%s\",\"modified_at\":"
                 "\"2026-11-21T12:00:00Z\",\"expires_at\":\"2318-11-21T12:00:00Z\",\"size\":1,\"size_vram\":0,"
                 "\"digest\":\"%064d\",\"details\":{\"format\":\"gguf\",\"family\":\"llama\"}}]}",
                 alias, alias, 0);
    else if (!strcmp(path, "/api/show"))
        return answer(who, 200, json, "{\"details\":{\"format\":\"gguf\",\"family\":\"llama\"},"
                      "\"model_info\":{},\"capabilities\":[\"completion\"]}");
    else
        return answer(who, 404, json, "{\"error\":{\"code\":404,\"message\":\"File Not Found\"}}");
    return answer(who, 200, json, text);
}

/* Serve each whole request that has come, one after another.  -1: the connection is done with. */
static int take_requests(int who) {
    link_t *link = &links[who];
    while (!link->streaming) {
        link->in[link->in_len] = 0;
        char *end = strstr(link->in, "\r\n\r\n"), *word;
        if (!end) return link->in_len >= HEAD_MOST - 1 ? -1 : 0;
        *end = 0;
        int size = (word = strcasestr(link->in, "\ncontent-length:")) ? atoi(word + 16) : 0;
        *end = '\r';
        char *body = end + 4;
        int whole = body - link->in + size;
        if (whole > link->in_len) return whole >= HEAD_MOST - 1 ? -1 : 0;
        char method[16], path[512], *mark, saved = body[size];
        if (sscanf(link->in, "%15s %511s", method, path) != 2) return -1;
        if ((mark = strchr(path, '?'))) *mark = 0;
        *end = 0;
        link->close = strcasestr(link->in, "\nconnection: close") || strstr(link->in, " HTTP/1.0");
        body[size] = 0;
        if (serve(who, path, body)) return -1;
        body[size] = saved;
        link->in_len -= whole;
        memmove(link->in, link->in + whole, link->in_len);
    }
    return 0;
}

static void engine(const char *host, int port) {
    all_descriptors();
    memset(padding, 'x', sizeof padding - 1);
    memset(heap_at, -1, sizeof heap_at);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    struct sockaddr_in place = address_of(host, port);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (void *)&place, sizeof place) || listen(listener, 4096)) die("listen");
    set_up(listener);
    engine_poll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[256];
    epoll_ctl(engine_poll, EPOLL_CTL_ADD, listener, &event);
    fprintf(stderr, "main: server is listening on http://%s:%d\n", host, port);
    for (;;) {
        int count = wait_until(engine_poll, events, 256, heap_size ? due[heap[0]] : -1);
        for (int i = 0; i < count; i++) {
            int who = events[i].data.fd;
            if (who == listener) {
                while ((who = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
                    if (who >= MOST) { close(who); continue; }
                    set_up(who);
                    if (!links[who].in) links[who].in = malloc(HEAD_MOST);
                    event.data.fd = who;
                    epoll_ctl(engine_poll, EPOLL_CTL_ADD, who, &event);
                }
                continue;
            }
            link_t *link = &links[who];
            int bad = 0;
            if (events[i].events & EPOLLOUT) bad = flush_out(who);
            if (!bad && events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP)) {
                ssize_t got = recv(who, link->in + link->in_len, HEAD_MOST - 1 - link->in_len, 0);
                if (got > 0) { link->in_len += got; bad = take_requests(who); }
                else bad = got == 0 || errno != EAGAIN;
            }
            if (bad) drop(who);
        }
        /* A few at a time, so that who asks is heard while many tokens are late. */
        for (int i = 0; i < 64 && heap_size && due[heap[0]] <= now_ns(); i++) {
            int who = heap[0];
            if (send_token(who) || (!links[who].streaming && (links[who].close || take_requests(who)))) drop(who);
        }
    }
}

/* ---- the client ----------------------------------------------------------------------------- */

typedef struct {
    int state, sent, tokens, status, slow, ended, leave_at, index, started;
    int64_t number, began, first, finished, next_read;
    char tail[8];
    char word[16];
    int word_len;
} stream_t;

static const char *host = "127.0.0.1", *path = "/v1/chat/completions", *token = "", *model = "bench";
static int port, ndjson;
static struct sockaddr_in target;
static float *late_ms, *first_ms;
static int late_count, first_count;

static int by_size(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

static double share(float *sorted, int count, double part) {
    if (!count) return -1;
    int at = (int)(part * count);
    return sorted[at < count ? at : count - 1];
}

static int request_text(char *to, int most, int tokens, int rate, int pad) {
    char body[1000];
    int size = snprintf(body, sizeof body, "{\"model\":\"%s\",\"messages\":[{\"role\":\"user\",\"content\":"
                        "\"tokens=%d rate=%d pad=%d\"}],\"stream\":true%s}", model, tokens, rate, pad,
                        ndjson ? "" : ",\"max_tokens\":4000");
    return snprintf(to, most, "POST %s HTTP/1.1\r\nHost: %s:%d\r\nAuthorization: Bearer %s\r\nContent-Type: "
                    "application/json\r\nContent-Length: %d\r\n\r\n%s", path, host, port, token, size, body);
}

/* Read what came: its times, and whether the answer is whole. */
static void take(stream_t *stream, const char *raw, ssize_t size, int64_t now, int count_late) {
    for (ssize_t i = 0; i < size; i++) {
        char c = raw[i];
        if (stream->word_len < 15) {
            stream->word[stream->word_len++] = c;
            if (stream->word_len == 12) stream->status = atoi(stream->word + 9);
        }
        if (c == '@') { stream->state = 1; stream->number = 0; }
        else if (stream->state) {
            if (c >= '0' && c <= '9') { stream->number = stream->number * 10 + c - '0'; stream->state++; }
            else {
                if (stream->state > 8) {
                    if (!stream->sent++) stream->first = now;
                    if (count_late) late_ms[late_count++] = (now - stream->number) / 1e6;
                }
                stream->state = 0;
            }
        }
    }
    int keep = size < 7 ? 7 - size : 0;
    memmove(stream->tail, stream->tail + 7 - keep, keep);
    memcpy(stream->tail + keep, raw + (size < 7 ? 0 : size - 7), 7 - keep);
    if (!memcmp(stream->tail, "\r\n0\r\n\r\n", 7)) { stream->ended = 1; stream->finished = now; }
}

static int first_token(int count, int kept) {
    char request[2000], raw[65536];
    int length = request_text(request, sizeof request, 1, 0, 0), one = 1, link = -1;
    printf("{\"first_ns\": [");
    for (int i = 0; i < count; i++) {
        stream_t stream = {0};
        int64_t began = now_ns();
        if (link < 0) {
            link = socket(AF_INET, SOCK_STREAM, 0);
            setsockopt(link, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
            if (connect(link, (void *)&target, sizeof target)) die("connect");
        }
        if (send(link, request, length, 0) != length) die("send");
        while (!stream.ended) {
            ssize_t got = recv(link, raw, sizeof raw, 0);
            if (got <= 0) break;
            take(&stream, raw, got, now_ns(), 0);
        }
        if (stream.status != 200 || !stream.sent) {
            fprintf(stderr, "HTTP %d: %.400s\n", stream.status, raw);
            return 1;
        }
        printf("%s%lld", i ? ", " : "", (long long)(stream.first - began));
        if (!kept) { close(link); link = -1; }
    }
    printf("]}\n");
    return 0;
}

static stream_t streams[MOST];
static int client_poll, of_link[MOST];

static int begin(int index, int tokens, int rate, int64_t now) {
    stream_t *stream = &streams[index];
    int leave_at = stream->leave_at, slow = stream->slow, small = 4096;
    char request[2000];
    memset(stream, 0, sizeof *stream);
    stream->slow = slow; stream->leave_at = leave_at; stream->index = index;
    stream->tokens = tokens; stream->began = now; stream->started = 1;
    int link = socket(AF_INET, SOCK_STREAM, 0);
    if (link < 0 || link >= MOST) die("socket");
    if (slow) setsockopt(link, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    set_up(link);
    if (connect(link, (void *)&target, sizeof target) && errno != EINPROGRESS) die("connect");
    of_link[link] = index;
    (void)request; (void)rate;
    struct epoll_event event = {.events = EPOLLOUT, .data.fd = link};
    epoll_ctl(client_poll, EPOLL_CTL_ADD, link, &event);
    return link;
}

static int many(int n, int tokens, int rate, int slow, int leave, int limit_s, int pad) {
    static char raw[1 << 18];
    char request[2000];
    struct epoll_event events[256], event;
    int started = 0, open = 0, failed = 0, whole = 0, left = 0, normal = 0, lost = 0, status = 0;
    int *link_of = calloc(n, sizeof *link_of);
    late_ms = malloc(sizeof(float) * (size_t)(n + 1) * (tokens + 1) * 2);
    first_ms = malloc(sizeof(float) * (n + 1) * 2);
    client_poll = epoll_create1(0);
    srand(7);
    int slow_each = slow ? 100 / slow : 0, leave_each = leave ? 100 / leave : 0;
    for (int i = 0; i < n; i++) {
        if (slow_each && i % slow_each == slow_each - 1) streams[i].slow = 1;
        else if (leave_each && i % leave_each == 0) streams[i].leave_at = tokens / 5 + rand() % (tokens / 2);
        if (!streams[i].slow && !streams[i].leave_at) normal++;
    }
    /* Over a second, so that the tokens are due evenly and not all at once. */
    int64_t start = now_ns() + 1000000, gap = 1000000000ll / n, limit = start + limit_s * 1000000000ll, now;
    int64_t first_at = start, last_at = start;
    while ((now = now_ns()) < limit && whole + failed < normal) {
        while (started < n && now >= start + started * gap) {
            link_of[started] = begin(started, tokens, rate, now);
            started++; open++;
        }
        int64_t until = started < n ? start + started * gap : now + 20000000;
        if (until > limit) until = limit;
        int count = wait_until(client_poll, events, 256, until);
        for (int i = 0; i < count; i++) {
            int link = events[i].data.fd;
            stream_t *stream = &streams[of_link[link]];
            if (events[i].events & EPOLLOUT) {
                int length = request_text(request, sizeof request, tokens, rate, stream->slow ? 4000 : pad);
                if (send(link, request, length, MSG_NOSIGNAL) == length) {
                    event.events = stream->slow ? 0 : EPOLLIN;
                    event.data.fd = link;
                    epoll_ctl(client_poll, EPOLL_CTL_MOD, link, &event);
                    continue;
                }
            }
            if (stream->slow && !(events[i].events & (EPOLLERR | EPOLLHUP))) continue;
            ssize_t got = recv(link, raw, sizeof raw, 0);
            if (got < 0 && errno == EAGAIN) continue;
            now = now_ns();
            int plain = !stream->slow && !stream->leave_at;
            if (got > 0) take(stream, raw, got, now, plain);
            if (stream->leave_at && stream->sent >= stream->leave_at) {
                struct linger hard = {1, 0};
                if (left++ % 2) setsockopt(link, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
                close(link);  /* half of them with a reset; and somebody else comes at once */
                if (now < start + 1000000000ll + tokens * 1000000000ll / rate)
                    link_of[stream->index] = begin(stream->index, tokens, rate, now);
                continue;
            }
            if (got > 0 && !stream->ended) continue;
            if (plain) {
                if (stream->ended && stream->status == 200 && stream->sent == tokens) {
                    whole++;
                    first_ms[first_count++] = (stream->first - stream->began) / 1e6;
                    last_at = now;
                } else { failed++; lost += tokens - stream->sent; status = stream->status; }
            }
            close(link);
            link_of[stream->index] = -1;
        }
        for (int i = 0; slow && i < started; i++) {
            stream_t *stream = &streams[i];
            if (!stream->slow || link_of[i] < 0 || now < stream->next_read) continue;
            stream->next_read = now + 100000000;  /* 20 kB/s of the 200 kB/s that are sent */
            ssize_t got = recv(link_of[i], raw, 2000, 0);
            if (got > 0) take(stream, raw, got, now, 0);
        }
    }
    int64_t tokens_came = 0;
    for (int i = 0; i < n; i++) tokens_came += streams[i].sent;
    for (int i = 0; i < n; i++)
        if (streams[i].started && !streams[i].slow && !streams[i].leave_at && !streams[i].ended) lost += tokens - streams[i].sent;
    qsort(late_ms, late_count, sizeof(float), by_size);
    qsort(first_ms, first_count, sizeof(float), by_size);
    printf("{\"streams\": %d, \"normal\": %d, \"whole\": %d, \"failed\": %d, \"left\": %d, \"tokens\": %lld, "
           "\"lost\": %d, \"status\": %d, \"seconds\": %.3f, \"late_p50_ms\": %.4f, \"late_p99_ms\": %.4f, "
           "\"late_max_ms\": %.4f, \"first_p50_ms\": %.4f, \"first_p99_ms\": %.4f}\n", n, normal, whole, failed,
           left, (long long)tokens_came, lost, status, (last_at - first_at) / 1e9, share(late_ms, late_count, .5),
           share(late_ms, late_count, .99), share(late_ms, late_count, 1), share(first_ms, first_count, .5),
           share(first_ms, first_count, .99));
    return 0;
}

int main(int count, char **words) {
    const char *name = basename(strdup(words[0]));
    if (!strcmp(name, "llama-server") || (count > 1 && !strcmp(words[1], "serve"))) {
        const char *at = "127.0.0.1";
        int on = 8080;
        if (count > 1 && (!strcmp(words[1], "--help") || !strcmp(words[1], "--version"))) {
            puts("version: 10488 (bench)\n-m -c -np -ngl --alias --host --port --metrics");
            return 0;
        }
        for (int i = 1; i + 1 < count; i++) {
            if (!strcmp(words[i], "--host")) at = words[i + 1];
            if (!strcmp(words[i], "--port")) on = atoi(words[i + 1]);
            if (!strcmp(words[i], "--alias")) snprintf(alias, sizeof alias, "%s", words[i + 1]);
        }
        if (!strcmp(words[1], "serve")) {
            char *place = strdup(getenv("OLLAMA_HOST") ? getenv("OLLAMA_HOST") : "127.0.0.1:11434");
            char *colon = strrchr(place, ':');
            snprintf(alias, sizeof alias, "bench:latest");
            if (colon) { *colon = 0; on = atoi(colon + 1); }
            at = place;
        }
        engine(at, on);
    }
    int n = 1, tokens = 150, rate = 50, requests = 100, kept = 0, slow = 0, leave = 0, limit_s = 20, pad = 0;
    struct { const char *key; int *number; const char **text; } known[] = {
        {"host", 0, &host}, {"path", 0, &path}, {"token", 0, &token}, {"model", 0, &model}, {"port", &port, 0},
        {"ndjson", &ndjson, 0}, {"n", &n, 0}, {"tokens", &tokens, 0}, {"rate", &rate, 0}, {"pad", &pad, 0},
        {"count", &requests, 0}, {"kept", &kept, 0}, {"slow", &slow, 0}, {"leave", &leave, 0},
        {"limit_s", &limit_s, 0}};
    for (int i = 2; i < count; i++) {
        char *value = strchr(words[i], '=');
        size_t at = 0, most = sizeof known / sizeof *known;
        if (value) *value++ = 0;
        while (at < most && strcmp(known[at].key, words[i])) at++;
        if (!value || at == most) { fprintf(stderr, "unknown: %s\n", words[i]); return 2; }
        if (known[at].number) *known[at].number = atoi(value); else *known[at].text = value;
    }
    all_descriptors();
    target = address_of(host, port);
    if (count > 1 && !strcmp(words[1], "first")) return first_token(requests, kept);
    if (count > 1 && !strcmp(words[1], "many")) return many(n, tokens, rate, slow, leave, limit_s, pad);
    fputs("first or many\n", stderr);
    return 2;
}
