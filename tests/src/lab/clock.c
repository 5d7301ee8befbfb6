/* Shows a program another time of day: LAB_CLOCK_OFFSET seconds are added. The lab compiles it and loads it
 * with LD_PRELOAD, since the clock of this machine must not be changed. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *time)
{
    int result = (int)syscall(SYS_clock_gettime, clock, time);
    const char *offset = getenv("LAB_CLOCK_OFFSET");
    if (result == 0 && clock == CLOCK_REALTIME && offset != NULL)
        time->tv_sec += atol(offset);
    return result;
}
