/* A clock of the day that jumps at every look, by up to twenty years back or forth; the monotonic one goes on evenly.
 *
 * For LD_PRELOAD. CLOCKS_SEED says where the jumps begin.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define YEAR (365L * 24 * 3600)

static unsigned long state;

static long jump(void)
{
    if (state == 0) {
        const char *seed = getenv("CLOCKS_SEED");
        state = (seed ? strtoul(seed, NULL, 10) : 1) * 2 + 1;
    }
    state = state * 6364136223846793005UL + 1442695040888963407UL;
    return (long)((state >> 20) % (40 * YEAR)) - 20 * YEAR;
}

int clock_gettime(clockid_t which, struct timespec *now)
{
    int result = (int)syscall(SYS_clock_gettime, which, now);
    if (result == 0 && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE))
        now->tv_sec += jump();
    return result;
}

int gettimeofday(struct timeval *now, void *zone)
{
    struct timespec time;
    int result = clock_gettime(CLOCK_REALTIME, &time);
    now->tv_sec = time.tv_sec;
    now->tv_usec = time.tv_nsec / 1000;
    return result;
}

time_t time(time_t *into)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into != NULL)
        *into = now.tv_sec;
    return now.tv_sec;
}
