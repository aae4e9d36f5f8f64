/* What Android's ONNX Runtime calls in Android's C library, for the C library of Linux on x86-64.
 *
 * `onnxruntime_java.py` renames a few of its undefined symbols to those below: where the two libraries have
 * other structures or numbers, or where a symbol without a version would be bound to an old function. */
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/select.h>
#include <time.h>
#include <unistd.h>

#define BIONIC_FILE 152 /* bytes of Android's FILE */
char __sF[3 * BIONIC_FILE];

static FILE *linux_file(void *file) {
    char *place = file;
    if (place == __sF) return stdin;
    if (place == __sF + BIONIC_FILE) return stdout;
    return place == __sF + 2 * BIONIC_FILE ? stderr : file;
}

int *__errno(void) { return __errno_location(); }
void __FD_SET_chk(int fd, fd_set *set, size_t size) { FD_SET(fd, set); }
int __FD_ISSET_chk(int fd, const fd_set *set, size_t size) { return FD_ISSET(fd, set); }
char *__strchr_chk(const char *text, int c, size_t size) { return strchr(text, c); }
size_t __strlen_chk(const char *text, size_t size) { return strlen(text); }
int __system_property_get(const char *name, char *value) { return value[0] = 0; }
void android_set_abort_message(const char *text) { fprintf(stderr, "%s\n", text); }

char *__gnu_strerror_r(int number, char *buffer, size_t size) {
    snprintf(buffer, size, "error %d", number);
    return buffer;
}

int __android_log_vprint(int priority, const char *tag, const char *format, va_list values) {
    fprintf(stderr, "%d %s: ", priority, tag);
    vfprintf(stderr, format, values);
    return fputc('\n', stderr);
}

int __android_log_print(int priority, const char *tag, const char *format, ...) {
    va_list values;
    va_start(values, format);
    int count = __android_log_vprint(priority, tag, format, values);
    va_end(values);
    return count;
}

int __android_log_write(int priority, const char *tag, const char *text) {
    return __android_log_print(priority, tag, "%s", text);
}

/* The renamed ones: their first letter is a b. */
long bysconf(int name) {
    switch (name) { /* Android's numbers */
        case 39: case 40: return sysconf(_SC_PAGESIZE);
        case 96: return sysconf(_SC_NPROCESSORS_CONF);
        case 97: return sysconf(_SC_NPROCESSORS_ONLN);
        case 98: return sysconf(_SC_PHYS_PAGES);
    }
    return -1;
}

char *bealpath(const char *path, char *buffer) { return realpath(path, buffer); }
int bflush(void *file) { return fflush(linux_file(file)); }
int bfprintf(void *file, const char *format, va_list values) { return vfprintf(linux_file(file), format, values); }
int bputs(const char *text, void *file) { return fputs(text, linux_file(file)); }
int bputc(int c, void *file) { return fputc(c, linux_file(file)); }
size_t bwrite(const void *data, size_t size, size_t count, void *file) {
    return fwrite(data, size, count, linux_file(file));
}

int bprintf(void *file, const char *format, ...) {
    va_list values;
    va_start(values, format);
    int count = vfprintf(linux_file(file), format, values);
    va_end(values);
    return count;
}

int bthread_cond_broadcast(pthread_cond_t *c) { return pthread_cond_broadcast(c); }
int bthread_cond_destroy(pthread_cond_t *c) { return pthread_cond_destroy(c); }
int bthread_cond_signal(pthread_cond_t *c) { return pthread_cond_signal(c); }
int bthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *m) { return pthread_cond_wait(c, m); }
int bthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *t) {
    return pthread_cond_timedwait(c, m, t);
}
