/* What the tests' guest does: writes numbered, checksummed records to its disks, one after the other, all the while.
 *
 * Record n goes to the first disk, then to the second, each time with O_DIRECT, so that at any one moment the disks hold
 * the records up to n, the last one perhaps only on the first of them. Every EACH records both disks are flushed. After
 * each record it rests for PACE milliseconds, of which the compiler is told. It says
 *
 *   R                  ready; "go" makes it begin, "hold" makes it wait (it says H NUMBER), "end" ends it,
 *                      and "again" has the guest reboot;
 *                      "from NUMBER." makes it begin after that record, when its disks have some from before
 *   T HEX              what its TPM's register has come to: "extend" extends it first, "register" does not
 *   F NUMBER MICROS    all records up to the number are flushed; the longest that a record took since the last F
 *   E ERRNO NUMBER     an I/O error
 *   D NUMBER           done: told to end, or the power button was pressed; all records are flushed
 *
 * tests/kit/records.py reads them. */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SIZE 4096
#define SLOTS 4096u
#define RUN 8u
#define EACH 8u
#define DISKS 2

struct record {
    char magic[8];
    uint64_t number, disk;
    unsigned char body[SIZE - 8 - 8 - 8 - 4];
    uint32_t sum;
} __attribute__((packed));

static int disks[DISKS], count, button = -1, going, again;
static uint64_t number;
static uint32_t table[256];

static void say(const char *form, ...) {
    char line[128];
    va_list values;
    va_start(values, form);
    int length = vsnprintf(line, sizeof line, form, values);
    va_end(values);
    (void)!write(1, line, length);
}

static int64_t micros(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000ll + now.tv_nsec / 1000;
}

static uint32_t crc32(const unsigned char *data, size_t length) {
    uint32_t sum = ~0u;
    while (length--) sum = table[(sum ^ *data++) & 255] ^ (sum >> 8);
    return ~sum;
}

static uint64_t slot(uint64_t number) {
    /* Runs of neighbours, the runs scattered: 13 and the number of runs have no common divisor. */
    return (number / RUN * 13 % (SLOTS / RUN)) * RUN + number % RUN;
}

static void put(struct record *record, int disk) {
    record->number = number;
    record->disk = disk;
    uint64_t x = number * 2654435761u + disk + 1;
    for (size_t i = 0; i + 8 <= sizeof record->body; i += 8) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        memcpy(record->body + i, &x, 8);
    }
    record->sum = crc32((unsigned char *)record, SIZE - 4);
    if (pwrite(disks[disk], record, SIZE, slot(number) * SIZE) != SIZE) say("E %d %llu\n", errno, (long long)number);
}

/* Extends the TPM's debug register, or does not, and says what it is then: the end of the answer to TPM2_PCR_Read.
 * The commands are those of the TPM 2.0 library specification, part 3. */
static void measure(int extend) {
    static const unsigned char begin[] = {0x80, 2, 0, 0, 0, 65, 0, 0, 1, 0x82, 0, 0, 0, 16, 0, 0, 0, 9, 0x40, 0, 0, 9, 0,
                                          0, 0, 0, 0, 0, 0, 0, 1, 0, 11, 's', 'n', 'a', 'p'};
    static const unsigned char query[] = {0x80, 1, 0, 0, 0, 20, 0, 0, 1, 0x7e, 0, 0, 0, 1, 0, 11, 3, 0, 0, 1};
    unsigned char command[65] = {0}, answer[4096];
    memcpy(command, begin, sizeof begin);
    int tpm = open("/dev/tpm0", O_RDWR);
    ssize_t length = 0;
    if (extend && (write(tpm, command, sizeof command) < 0 || read(tpm, answer, sizeof answer) < 10 || answer[9]))
        say("E %d tpm\n", errno);
    if (write(tpm, query, sizeof query) < 0 || (length = read(tpm, answer, sizeof answer)) < 42) say("E %d tpm\n", errno);
    else say("T %08x\n", (unsigned)be32toh(*(uint32_t *)(answer + length - 32)));
    if (tpm >= 0) close(tpm);
}

/* Whether to go on: takes orders from the console and looks at the power button. */
static int listen_for(int milliseconds) {
    static char order[64];
    static size_t length;
    struct pollfd wanted[2] = {{0, POLLIN, 0}, {button, POLLIN, 0}};
    if (poll(wanted, button < 0 ? 1 : 2, milliseconds) <= 0) return 1;
    if (wanted[1].revents & POLLIN) {
        struct input_event event;
        if (read(button, &event, sizeof event) == sizeof event && event.type == EV_KEY && event.code == KEY_POWER) return 0;
    }
    if (wanted[0].revents & POLLIN) {
        char each;
        while (read(0, &each, 1) == 1) {
            if (each != '\n' && each != '\r') {
                if (length < sizeof order - 1) order[length++] = each;
                continue;
            }
            order[length] = 0, length = 0;
            if (!strcmp(order, "go")) going = 1;
            if (!strcmp(order, "hold")) going = 0, say("H %llu\n", (long long)number);
            if (!strncmp(order, "from ", 5)) {
                /* The end of an order may be lost, and the next then follows on it: the stop tells that it is whole. */
                char *end;
                uint64_t wanted = strtoull(order + 5, &end, 10);
                if (!strcmp(end, ".")) number = wanted, going = 1;
            }
            if (!strcmp(order, "extend")) measure(1);
            if (!strcmp(order, "register")) measure(0);
            if (!strcmp(order, "again")) again = 3;
            if (again || !strcmp(order, "end")) return 0;
        }
    }
    return 1;
}

static void flush(int64_t *longest) {
    static int64_t said;
    for (int disk = 0; disk < count; disk++)
        if (fdatasync(disks[disk])) say("E %d %llu\n", errno, (long long)number);
    int64_t now = micros();
    /* The console is slow; the flushes are not told one by one. */
    if (now - said < 20000) return;
    say("F %llu %lld\n", (long long)number, (long long)*longest);
    said = now, *longest = 0;
}

int main(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320u ^ (value >> 1) : value >> 1;
        table[i] = value;
    }
    const char *names[DISKS] = {"/dev/vda", "/dev/vdb"};
    while (count < DISKS && (disks[count] = open(names[count], O_RDWR | O_DIRECT)) >= 0) count++;
    for (int number = 0; number < 8 && button < 0; number++) {
        char path[32], name[64] = "";
        snprintf(path, sizeof path, "/dev/input/event%d", number);
        button = open(path, O_RDONLY | O_NONBLOCK);
        if (button >= 0 && (ioctl(button, EVIOCGNAME(sizeof name), name) < 0 || !strstr(name, "Power"))) close(button), button = -1;
    }
    fcntl(0, F_SETFL, fcntl(0, F_GETFL) | O_NONBLOCK);
    struct record *record = aligned_alloc(SIZE, SIZE);
    memcpy(record->magic, "SNAPREC1", 8);
    say("R %d%s\n", count, button < 0 ? " no button" : "");
    int64_t longest = 0;
    while (listen_for(going ? PACE : 50)) {
        if (!going) continue;
        int64_t before = micros();
        number++;
        for (int disk = 0; disk < count; disk++) put(record, disk);
        if (number % EACH == 0) flush(&longest);
        int64_t took = micros() - before;
        if (took > longest) longest = took;
    }
    for (int disk = 0; disk < count; disk++)
        if (fdatasync(disks[disk])) say("E %d %llu\n", errno, (long long)number);
    say("D %llu\n", (long long)number);
    return again;
}
