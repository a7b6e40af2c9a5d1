/*
 * A libnvidia-ml.so.1 without a GPU: plays what the file named by NVML_STUB says, read again at every call.
 * Loaded by an unmodified nvidia-ml-py; the signatures are those of the official nvml.h.
 *
 *     gpu UUID TOTAL USED NAME    a GPU; the name may have spaces
 *     mig UUID TOTAL USED NAME    a MIG instance of the GPU above, which is in MIG mode then
 *     mig -                       an empty slot for one
 *     process PID BYTES           computes on the device above; BYTES may be "none"
 *     early535                    the entries of process lists are as long as early 535 drivers made them
 *     crowd                       more processes than the caller has room for, however often it asks
 *     fail FUNCTION CODE [UUID]   FUNCTION, or every one if "*", returns CODE [for that device]
 *
 * If NVML_STUB_TRACE names a file, every call appends "PID FUNCTION" to it. Stricter than a driver: NVML must
 * be started again in a forked process, and a handle is good only in the process that asked for it.
 *
 * How it is compiled: test_nvml.py, which gives what pynvml's structures look like as -D.
 */
#include <inttypes.h>
#include <nvml.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SAME(pynvml, header) _Static_assert((pynvml) == (header), "pynvml's " #pynvml " is not nvml.h's")
SAME(MEMORY_SIZE, sizeof(nvmlMemory_t));
SAME(MEMORY_TOTAL, offsetof(nvmlMemory_t, total));
SAME(MEMORY_FREE, offsetof(nvmlMemory_t, free));
SAME(MEMORY_USED, offsetof(nvmlMemory_t, used));
SAME(PROCESS_SIZE, sizeof(nvmlProcessInfo_t));
SAME(PROCESS_PID, offsetof(nvmlProcessInfo_t, pid));
SAME(PROCESS_USED, offsetof(nvmlProcessInfo_t, usedGpuMemory));
SAME(PROCESS_GPU_INSTANCE, offsetof(nvmlProcessInfo_t, gpuInstanceId));
SAME(PROCESS_COMPUTE_INSTANCE, offsetof(nvmlProcessInfo_t, computeInstanceId));
SAME(NAME_LENGTH, NVML_DEVICE_NAME_V2_BUFFER_SIZE);
SAME(UUID_LENGTH, NVML_DEVICE_UUID_V2_BUFFER_SIZE);

/* What nvmlDeviceGetComputeRunningProcesses_v3 wrote in drivers 535.43 to 535.86. */
typedef struct {
    nvmlProcessInfo_t entry;
    unsigned long long usedGpuCcProtectedMemory;
} early535_t;
_Static_assert(sizeof(early535_t) == 32, "early 535 drivers wrote entries of 32 bytes");

enum { DEVICES = 32, PROCESSES = 64, FAILURES = 16, TEXT = 96 };

typedef struct {
    char uuid[TEXT], name[TEXT];
    unsigned long long total, used;
    int parent; /* of a MIG instance; -1: it is a GPU */
    unsigned int slots; /* for MIG instances; 0: not in MIG mode */
    unsigned int process_count;
    nvmlProcessInfo_t processes[PROCESSES];
} device_t;

typedef struct {
    device_t devices[DEVICES];
    int device_count, is_early535, is_crowded, failure_count;
    struct {
        char function[TEXT], uuid[TEXT];
        int code;
    } failures[FAILURES];
} scenario_t;

static scenario_t now;
static unsigned int generation; /* of handles: one for each process that started NVML */
static pid_t started_in;

static void give_up(const char *why, const char *what) {
    fprintf(stderr, "nvml_stub: %s: %s\n", why, what);
    _exit(70);
}

static void read_scenario(void) {
    const char *path = getenv("NVML_STUB");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512], bytes[TEXT];
    int gpu = -1;
    if (!file) give_up("cannot read the file that NVML_STUB names", path ? path : "(unset)");
    memset(&now, 0, sizeof now);
    while (fgets(line, sizeof line, file)) {
        device_t *last = now.device_count ? &now.devices[now.device_count - 1] : NULL;
        device_t new = {.parent = -1};
        unsigned int pid;
        line[strcspn(line, "\n")] = 0;
        if (now.device_count == DEVICES || now.failure_count == FAILURES) give_up("too long", path);
        if (sscanf(line, "gpu %95s %llu %llu %95[^\n]", new.uuid, &new.total, &new.used, new.name) == 4) {
            gpu = now.device_count;
            now.devices[now.device_count++] = new;
        } else if (gpu >= 0 && (!strcmp(line, "mig -") ||
                                sscanf(line, "mig %95s %llu %llu %95[^\n]", new.uuid, &new.total, &new.used,
                                       new.name) == 4)) {
            now.devices[gpu].slots++;
            new.parent = gpu;
            now.devices[now.device_count++] = new;
        } else if (last && last->process_count < PROCESSES &&
                   sscanf(line, "process %u %95s", &pid, bytes) == 2) {
            nvmlProcessInfo_t *entry = &last->processes[last->process_count++];
            entry->pid = pid;
            entry->usedGpuMemory = (unsigned long long)NVML_VALUE_NOT_AVAILABLE;
            entry->gpuInstanceId = entry->computeInstanceId = 0xFFFFFFFF; /* as outside MIG */
            if (strcmp(bytes, "none")) entry->usedGpuMemory = strtoull(bytes, NULL, 10);
        } else if (!strcmp(line, "early535")) {
            now.is_early535 = 1;
        } else if (!strcmp(line, "crowd")) {
            now.is_crowded = 1;
        } else if (sscanf(line, "fail %95s %d %95s", now.failures[now.failure_count].function,
                          &now.failures[now.failure_count].code, now.failures[now.failure_count].uuid) >= 2) {
            now.failure_count++;
        } else if (line[0]) {
            give_up("does not understand", line);
        }
    }
    fclose(file);
}

static nvmlReturn_t failure(const char *function, const char *uuid) {
    for (int i = 0; i < now.failure_count; i++) {
        const char *of = now.failures[i].uuid;
        int is_it = !strcmp(now.failures[i].function, "*") || !strcmp(now.failures[i].function, function);
        if (is_it && (!*of || !strcmp(of, uuid))) return now.failures[i].code;
    }
    return NVML_SUCCESS;
}

/* Begin a call: trace it, read the scenario, and return the error that it plays. */
static nvmlReturn_t begin(const char *function, const char *uuid) {
    const char *trace = getenv("NVML_STUB_TRACE");
    if (trace) {
        FILE *file = fopen(trace, "a");
        if (!file) give_up("cannot write the file that NVML_STUB_TRACE names", trace);
        fprintf(file, "%d %s\n", (int)getpid(), function);
        fclose(file);
    }
    read_scenario();
    if (!strncmp(function, "nvmlInit", 8)) return failure(function, uuid);
    if (started_in != getpid()) return NVML_ERROR_UNINITIALIZED;
    return failure(function, uuid);
}

static nvmlDevice_t handle_of(int device) {
    return (nvmlDevice_t)(uintptr_t)(((uintptr_t)generation << 16) | (unsigned int)(device + 1));
}

/* As begin(), about one device, which *device is set to. */
static nvmlReturn_t begin_at(const char *function, nvmlDevice_t handle, device_t **device) {
    int number = (int)((uintptr_t)handle & 0xFFFF) - 1;
    nvmlReturn_t result = begin(function, "");
    if (result != NVML_SUCCESS) return result;
    if (number < 0 || handle != handle_of(number)) return NVML_ERROR_INVALID_ARGUMENT;
    if (number >= now.device_count) return NVML_ERROR_GPU_IS_LOST;
    *device = &now.devices[number];
    return failure(function, (*device)->uuid);
}

static nvmlReturn_t copy(const char *text, char *to, unsigned int length) {
    if (strlen(text) + 1 > length) return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(to, text);
    return NVML_SUCCESS;
}

#define TRY(call)                                     \
    do {                                              \
        nvmlReturn_t result_ = (call);                \
        if (result_ != NVML_SUCCESS) return result_; \
    } while (0)

nvmlReturn_t nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    TRY(begin(__func__, ""));
    if (started_in != getpid()) generation++;
    started_in = getpid();
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

#undef nvmlInit /* nvml.h makes it another name of nvmlInit_v2; torch calls it by this one */
nvmlReturn_t nvmlInit(void) { return nvmlInitWithFlags(0); }

nvmlReturn_t nvmlShutdown(void) {
    TRY(begin(__func__, ""));
    started_in = 0;
    return NVML_SUCCESS;
}

const char *nvmlErrorString(nvmlReturn_t result) {
    (void)result;
    return "an error of the stub";
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count) {
    TRY(begin(__func__, ""));
    *count = 0;
    for (int i = 0; i < now.device_count; i++) *count += now.devices[i].parent < 0;
    return NVML_SUCCESS;
}

/* Give the handle of the device with this index among the GPUs (-1), or among the instances of a GPU. */
static nvmlReturn_t find(const char *function, int parent, unsigned int index, nvmlDevice_t *handle) {
    for (int i = 0; i < now.device_count; i++) {
        if (now.devices[i].parent != parent || index-- > 0) continue;
        if (!*now.devices[i].uuid) return NVML_ERROR_NOT_FOUND; /* an empty slot */
        *handle = handle_of(i);
        return failure(function, now.devices[i].uuid);
    }
    return NVML_ERROR_INVALID_ARGUMENT;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *handle) {
    TRY(begin(__func__, ""));
    return find(__func__, -1, index, handle);
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *handle) {
    TRY(begin(__func__, uuid));
    for (int i = 0; i < now.device_count; i++)
        if (*uuid && !strcmp(now.devices[i].uuid, uuid)) {
            *handle = handle_of(i);
            return NVML_SUCCESS;
        }
    return NVML_ERROR_NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t handle, char *name, unsigned int length) {
    device_t *device;
    TRY(begin_at(__func__, handle, &device));
    return copy(device->name, name, length);
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t handle, char *uuid, unsigned int length) {
    device_t *device;
    TRY(begin_at(__func__, handle, &device));
    return copy(device->uuid, uuid, length);
}

/* Version 2 is missing, as if on a system that does not have it. */
nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t handle, nvmlMemory_t *memory) {
    device_t *device;
    TRY(begin_at(__func__, handle, &device));
    memory->total = device->total;
    memory->free = device->total - device->used;
    memory->used = device->used;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t handle, unsigned int *count,
                                                     nvmlProcessInfo_t *entries) {
    device_t *device;
    unsigned int room = *count;
    TRY(begin_at(__func__, handle, &device));
    *count = device->process_count;
    if (now.is_crowded) *count = room + 1;
    if (room < *count || (*count && !entries)) return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned int i = 0; i < *count; i++) {
        early535_t long_entry = {.entry = device->processes[i]};
        if (!now.is_early535)
            entries[i] = device->processes[i];
        else if ((i + 1) * sizeof long_entry <= room * sizeof *entries) /* the driver did not even look */
            memcpy((char *)entries + i * sizeof long_entry, &long_entry, sizeof long_entry);
    }
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t handle, unsigned int *current, unsigned int *pending) {
    device_t *device;
    TRY(begin_at(__func__, handle, &device));
    *current = *pending = device->slots ? NVML_DEVICE_MIG_ENABLE : NVML_DEVICE_MIG_DISABLE;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t handle, unsigned int *count) {
    device_t *device;
    TRY(begin_at(__func__, handle, &device));
    *count = device->slots;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t handle, unsigned int index,
                                                 nvmlDevice_t *instance) {
    device_t *device;
    TRY(begin_at(__func__, handle, &device));
    return find(__func__, (int)(device - now.devices), index, instance);
}
