/* A library with NVML's ABI whose GPUs are read anew at every call, from the file nvml.state that lies
 * beside it: each copy of the library is a machine of its own.
 *
 * Structs and signatures as in nvml.h (API 13). Only what monitors ask for is here; a symbol that is
 * missing is what a monitor meets on older drivers. Built with -DOLD_DRIVER it lacks what drivers
 * before 510 lack.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "state.h"

typedef int nvmlReturn_t;
typedef struct handle *nvmlDevice_t;

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15,
    ARGUMENT_VERSION_MISMATCH = 25
};

/* A handle is the address of its place in this table: GPU, then slot + 1 (0 is the GPU itself). */
struct handle {
    char place;
};
static struct handle handles[MOST_GPUS * (MOST_SLOTS + 1)];

static char state_path[1024];
static int references;
static pid_t started_by;
static unsigned growths;

static void sleep_milliseconds(unsigned milliseconds)
{
    struct timespec time = {milliseconds / 1000, (long)(milliseconds % 1000) * 1000000L};
    nanosleep(&time, NULL);
}

static void journal(const struct state *state, const char *call, int gpu)
{
    if (!state->journal[0])
        return;
    FILE *file = fopen(state->journal, "a");
    if (!file)
        return;
    fprintf(file, "%d %ld %s %d\n", (int)getpid(), (long)syscall(SYS_gettid), call, gpu);
    fclose(file);
}

static const struct rule *rule_for(const struct rules *rules, enum rule_kind kind, const char *call)
{
    for (int i = 0; i < rules->count; i++) {
        const struct rule *rule = &rules->list[i];
        if (rule->kind == kind && (strcmp(rule->call, call) == 0 || strcmp(rule->call, "*") == 0))
            return rule;
    }
    return NULL;
}

static struct device *device_at(struct state *state, long place)
{
    long gpu = place / (MOST_SLOTS + 1), slot = place % (MOST_SLOTS + 1);
    if (gpu < 0 || gpu >= state->gpu_count)
        return NULL;
    if (slot == 0)
        return &state->gpus[gpu];
    for (int i = 0; i < state->mig_count; i++)
        if (state->migs[i].parent == gpu && state->migs[i].slot == (unsigned)slot - 1)
            return &state->migs[i];
    return NULL;
}

static const struct rules *rules_of(struct state *state, long place)
{
    struct device *device = place < 0 ? NULL : device_at(state, place);
    return device ? &device->rules : &state->rules;
}

/* What every call does first: reads the state, waits where it hangs or is slow, fails where it fails.
 * place is that of the device, or -1 for calls that concern none. On success the caller frees state. */
static nvmlReturn_t enter(const char *call, long place, struct state **state)
{
    *state = NULL;
    if (references == 0 || started_by != getpid())
        return UNINITIALIZED; /* as NVML: nothing of it survives a fork */
    struct state *now = read_state(state_path);
    if (!now)
        return DRIVER_NOT_LOADED;
    journal(now, call, place < 0 ? -1 : (int)(place / (MOST_SLOTS + 1)));
    while (rule_for(rules_of(now, place), RULE_HANG, call)) {
        free(now);
        sleep_milliseconds(5);
        now = read_state(state_path);
        if (!now)
            return DRIVER_NOT_LOADED;
    }
    const struct rule *slow = rule_for(rules_of(now, place), RULE_SLOW, call);
    if (slow)
        sleep_milliseconds(slow->value);
    const struct rule *error = rule_for(rules_of(now, place), RULE_ERROR, call);
    if (error) {
        nvmlReturn_t code = (nvmlReturn_t)error->value;
        free(now);
        return code;
    }
    *state = now;
    return SUCCESS;
}

static nvmlReturn_t enter_device(const char *call, nvmlDevice_t handle, struct state **state, struct device **device)
{
    if (!handle)
        abort(); /* as NVML, which crashes */
    nvmlReturn_t code = enter(call, handle - handles, state);
    if (code != SUCCESS)
        return code;
    *device = device_at(*state, handle - handles);
    if (!*device) {
        free(*state);
        return GPU_IS_LOST;
    }
    return SUCCESS;
}

static nvmlReturn_t leave(struct state *state, nvmlReturn_t code)
{
    free(state);
    return code;
}

static nvmlReturn_t put_text(char *target, unsigned length, const char *text)
{
    if (strlen(text) >= length)
        return INSUFFICIENT_SIZE;
    strcpy(target, text);
    return SUCCESS;
}

#define ENTER(call)                                        \
    struct state *state;                                   \
    nvmlReturn_t entered = enter(#call, -1, &state);       \
    if (entered != SUCCESS)                                \
        return entered

#define ENTER_DEVICE(call)                                              \
    struct state *state;                                                \
    struct device *device;                                              \
    nvmlReturn_t entered = enter_device(#call, handle, &state, &device); \
    if (entered != SUCCESS)                                             \
        return entered

/* --- starting and stopping --- */

static nvmlReturn_t start(const char *call)
{
    Dl_info self;
    if (!dladdr(&references, &self))
        return DRIVER_NOT_LOADED;
    const char *slash = strrchr(self.dli_fname, '/');
    int folder = slash ? (int)(slash - self.dli_fname) + 1 : 0;
    if (started_by != getpid()) {
        references = 0;
        started_by = getpid();
    }
    snprintf(state_path, sizeof state_path, "%.*snvml.state", folder, self.dli_fname);
    references++;
    struct state *state;
    nvmlReturn_t code = enter(call, -1, &state);
    if (code != SUCCESS)
        references--;
    return leave(state, code);
}

nvmlReturn_t nvmlInit_v2(void)
{
    return start("nvmlInit_v2");
}

nvmlReturn_t nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    return start("nvmlInit_v2");
}

nvmlReturn_t nvmlShutdown(void)
{
    ENTER(nvmlShutdown);
    references--;
    return leave(state, SUCCESS);
}

const char *nvmlErrorString(nvmlReturn_t code)
{
    switch (code) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case GPU_IS_LOST: return "GPU is lost";
    default: return "Unknown Error";
    }
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned length)
{
    ENTER(nvmlSystemGetDriverVersion);
    return leave(state, put_text(version, length, state->driver));
}

nvmlReturn_t nvmlSystemGetNVMLVersion(char *version, unsigned length)
{
    ENTER(nvmlSystemGetNVMLVersion);
    return leave(state, put_text(version, length, state->nvml));
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    ENTER(nvmlSystemGetCudaDriverVersion_v2);
    *version = 13000;
    return leave(state, SUCCESS);
}

/* --- handles --- */

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count)
{
    ENTER(nvmlDeviceGetCount_v2);
    *count = (unsigned)state->gpu_count;
    return leave(state, SUCCESS);
}

static nvmlReturn_t put_handle(const char *call, long place, nvmlDevice_t *handle)
{
    struct state *state;
    nvmlReturn_t code = enter(call, place, &state);
    if (code != SUCCESS)
        return code;
    struct device *device = device_at(state, place);
    *handle = device && !device->null_handle ? &handles[place] : NULL;
    return leave(state, device ? SUCCESS : NOT_FOUND);
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *handle)
{
    ENTER(nvmlDeviceGetHandleByIndex_v2);
    int known = index < (unsigned)state->gpu_count;
    free(state);
    if (!known)
        return INVALID_ARGUMENT;
    return put_handle("nvmlDeviceGetHandleByIndex_v2", (long)index * (MOST_SLOTS + 1), handle);
}

static long place_of(const struct state *state, const char *uuid, const char *pci)
{
    for (int i = 0; i < state->gpu_count; i++)
        if ((uuid && strcmp(state->gpus[i].uuid, uuid) == 0) || (pci && strcmp(state->gpus[i].pci, pci) == 0))
            return (long)i * (MOST_SLOTS + 1);
    for (int i = 0; i < state->mig_count; i++)
        if (uuid && strcmp(state->migs[i].uuid, uuid) == 0)
            return (long)state->migs[i].parent * (MOST_SLOTS + 1) + state->migs[i].slot + 1;
    return -1;
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *handle)
{
    ENTER(nvmlDeviceGetHandleByUUID);
    long place = place_of(state, uuid, NULL);
    free(state);
    return place < 0 ? NOT_FOUND : put_handle("nvmlDeviceGetHandleByUUID", place, handle);
}

nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *pci, nvmlDevice_t *handle)
{
    ENTER(nvmlDeviceGetHandleByPciBusId_v2);
    long place = place_of(state, NULL, pci);
    free(state);
    return place < 0 ? NOT_FOUND : put_handle("nvmlDeviceGetHandleByPciBusId_v2", place, handle);
}

/* --- MIG --- */

nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t handle, unsigned *current, unsigned *pending)
{
    ENTER_DEVICE(nvmlDeviceGetMigMode);
    *current = *pending = device->mig_slots > 0;
    return leave(state, device->has_capability && device->major >= 8 ? SUCCESS : NOT_SUPPORTED);
}

nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t handle, unsigned *count)
{
    ENTER_DEVICE(nvmlDeviceGetMaxMigDeviceCount);
    *count = device->mig_slots;
    return leave(state, SUCCESS);
}

nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t handle, unsigned slot, nvmlDevice_t *mig)
{
    ENTER_DEVICE(nvmlDeviceGetMigDeviceHandleByIndex);
    long place = handle - handles + slot + 1;
    struct device *found = slot < MOST_SLOTS ? device_at(state, place) : NULL;
    *mig = found ? &handles[place] : NULL;
    return leave(state, found ? SUCCESS : NOT_FOUND);
}

nvmlReturn_t nvmlDeviceIsMigDeviceHandle(nvmlDevice_t handle, unsigned *is_mig)
{
    ENTER_DEVICE(nvmlDeviceIsMigDeviceHandle);
    *is_mig = device->parent >= 0;
    return leave(state, SUCCESS);
}

nvmlReturn_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice_t handle, nvmlDevice_t *parent)
{
    ENTER_DEVICE(nvmlDeviceGetDeviceHandleFromMigDeviceHandle);
    int is_mig = device->parent >= 0;
    if (is_mig)
        *parent = &handles[(long)device->parent * (MOST_SLOTS + 1)];
    return leave(state, is_mig ? SUCCESS : INVALID_ARGUMENT);
}

#include "values.h"
