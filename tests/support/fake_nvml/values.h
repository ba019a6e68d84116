/* The calls that read one value of one device; part of nvml.c. */

typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_sub_system_id;
    char bus_id[32];
} nvmlPciInfo_t;

typedef struct {
    unsigned long long total, free, used;
} nvmlMemory_t;

typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} nvmlMemory_v2_t;

typedef struct {
    unsigned gpu, memory;
} nvmlUtilization_t;

typedef struct {
    unsigned version, sensor;
    int temperature;
} nvmlTemperature_t;

typedef struct {
    unsigned pid;
    unsigned long long used;
} nvmlProcessInfo_v1_t;

typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} nvmlProcessInfo_t;

nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t handle, unsigned *index)
{
    ENTER_DEVICE(nvmlDeviceGetIndex);
    *index = device->parent >= 0 ? device->slot : (unsigned)((handle - handles) / (MOST_SLOTS + 1));
    return leave(state, SUCCESS);
}

nvmlReturn_t nvmlDeviceGetMinorNumber(nvmlDevice_t handle, unsigned *minor)
{
    ENTER_DEVICE(nvmlDeviceGetMinorNumber);
    *minor = (unsigned)((handle - handles) / (MOST_SLOTS + 1));
    return leave(state, SUCCESS);
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t handle, char *name, unsigned length)
{
    ENTER_DEVICE(nvmlDeviceGetName);
    return leave(state, put_text(name, length, device->name));
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t handle, char *uuid, unsigned length)
{
    ENTER_DEVICE(nvmlDeviceGetUUID);
    return leave(state, put_text(uuid, length, device->uuid));
}

static void put_pci(nvmlPciInfo_t *pci, const char *address)
{
    memset(pci, 0, sizeof *pci);
    snprintf(pci->bus_id, sizeof pci->bus_id, "%.31s", address);
    sscanf(address, "%x:%x:%x", &pci->domain, &pci->bus, &pci->device);
    snprintf(pci->bus_id_legacy, sizeof pci->bus_id_legacy, "%04X:%02X:%02X.0", pci->domain & 0xffff,
             pci->bus & 0xff, pci->device & 0xff);
}

nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t handle, nvmlPciInfo_t *pci)
{
    ENTER_DEVICE(nvmlDeviceGetPciInfo_v3);
    put_pci(pci, device->pci);
    return leave(state, SUCCESS);
}

/* Version 1 counts what the driver reserves as used. */
nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t handle, nvmlMemory_t *memory)
{
    ENTER_DEVICE(nvmlDeviceGetMemoryInfo);
    if (!device->has_memory)
        return leave(state, NOT_SUPPORTED);
    memory->total = device->total;
    memory->free = device->free;
    memory->used = device->used + device->reserved;
    return leave(state, SUCCESS);
}

nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t handle, nvmlUtilization_t *rates)
{
    ENTER_DEVICE(nvmlDeviceGetUtilizationRates);
    if (!device->has_utilization)
        return leave(state, NOT_SUPPORTED);
    rates->gpu = device->utilization;
    rates->memory = device->memory_utilization;
    return leave(state, SUCCESS);
}

#ifndef WITHOUT_TEMPERATURE
nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t handle, unsigned sensor, unsigned *celsius)
{
    ENTER_DEVICE(nvmlDeviceGetTemperature);
    if (sensor != 0)
        return leave(state, INVALID_ARGUMENT);
    *celsius = device->temperature;
    return leave(state, device->has_temperature ? SUCCESS : NOT_SUPPORTED);
}
#endif

nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t handle, nvmlTemperature_t *temperature)
{
    ENTER_DEVICE(nvmlDeviceGetTemperatureV);
    if (temperature->version != (sizeof *temperature | 1U << 24))
        return leave(state, ARGUMENT_VERSION_MISMATCH);
    temperature->temperature = (int)device->temperature;
    return leave(state, device->has_temperature ? SUCCESS : NOT_SUPPORTED);
}

nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t handle, unsigned *milliwatts)
{
    ENTER_DEVICE(nvmlDeviceGetPowerUsage);
    *milliwatts = device->milliwatts;
    return leave(state, device->has_power ? SUCCESS : NOT_SUPPORTED);
}

nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t handle, int *major, int *minor)
{
    ENTER_DEVICE(nvmlDeviceGetCudaComputeCapability);
    *major = device->major;
    *minor = device->minor;
    return leave(state, device->has_capability ? SUCCESS : NOT_SUPPORTED);
}

nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t handle, unsigned long long *reasons)
{
    ENTER_DEVICE(nvmlDeviceGetCurrentClocksThrottleReasons);
    *reasons = device->throttle;
    return leave(state, SUCCESS);
}

nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t handle, unsigned long long *reasons)
{
    ENTER_DEVICE(nvmlDeviceGetCurrentClocksEventReasons);
    *reasons = device->throttle;
    return leave(state, SUCCESS);
}

nvmlReturn_t nvmlDeviceGetNumaNodeId(nvmlDevice_t handle, unsigned *node)
{
    ENTER_DEVICE(nvmlDeviceGetNumaNodeId);
    *node = device->numa;
    return leave(state, device->has_numa ? SUCCESS : NOT_SUPPORTED);
}

/* --- links: those after the last that is up are down, as NVML says of a GPU whose bridge is off --- */

nvmlReturn_t nvmlDeviceGetNvLinkState(nvmlDevice_t handle, unsigned link, unsigned *is_active)
{
    ENTER_DEVICE(nvmlDeviceGetNvLinkState);
    if (device->link_count == 0)
        return leave(state, NOT_SUPPORTED);
    *is_active = link < device->link_count;
    return leave(state, link < MOST_LINKS ? SUCCESS : INVALID_ARGUMENT);
}

nvmlReturn_t nvmlDeviceGetNvLinkRemotePciInfo_v2(nvmlDevice_t handle, unsigned link, nvmlPciInfo_t *pci)
{
    ENTER_DEVICE(nvmlDeviceGetNvLinkRemotePciInfo_v2);
    if (link >= device->link_count)
        return leave(state, INVALID_ARGUMENT);
    put_pci(pci, device->links[link]);
    return leave(state, SUCCESS);
}

/* --- processes --- */

/* How many there are, and whether the caller's buffer holds them; else NVML says 7 and the count. */
static nvmlReturn_t size_list(const struct device *device, int graphics, unsigned *capacity, int has_buffer)
{
    unsigned count = 0;
    for (int i = 0; i < device->process_count; i++)
        count += (unsigned)(device->processes[i].graphics == graphics);
    unsigned room = has_buffer ? *capacity : 0;
    *capacity = count;
    if (!has_buffer && growths < device->growth_times && count > device->growth) {
        growths++;
        *capacity = count - device->growth;
    } else if (device->growth_times == 0) {
        growths = 0;
    }
    return count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

static nvmlReturn_t list(const char *call, nvmlDevice_t handle, int graphics, unsigned *capacity, void *buffer,
                         size_t element)
{
    struct state *state;
    struct device *device;
    nvmlReturn_t code = enter_device(call, handle, &state, &device);
    if (code != SUCCESS)
        return code;
    code = size_list(device, graphics, capacity, buffer != NULL);
    if (code != SUCCESS || !buffer)
        return leave(state, code);
    char *place = buffer;
    for (int i = 0; i < device->process_count; i++) {
        if (device->processes[i].graphics != graphics)
            continue;
        nvmlProcessInfo_t process = {device->processes[i].pid, device->processes[i].bytes, ~0U, ~0U};
        memcpy(place, &process, element < sizeof process ? element : sizeof process);
        place += element;
    }
    return leave(state, SUCCESS);
}

#ifndef OLD_DRIVER
nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t handle, nvmlMemory_v2_t *memory)
{
    ENTER_DEVICE(nvmlDeviceGetMemoryInfo_v2);
    if (memory->version != (sizeof *memory | 2U << 24))
        return leave(state, ARGUMENT_VERSION_MISMATCH);
    if (!device->has_memory)
        return leave(state, NOT_SUPPORTED);
    memory->total = device->total;
    memory->reserved = device->reserved;
    memory->free = device->free;
    memory->used = device->used;
    return leave(state, SUCCESS);
}

/* Drivers from 535.43 to before 535.86 write elements of 32 bytes where 24 are expected. */
static size_t third_version_element(void)
{
    unsigned major = 0, minor = 0;
    struct state *state = read_state(state_path);
    if (state)
        sscanf(state->driver, "%u.%u", &major, &minor);
    free(state);
    return major == 535 && minor >= 43 && minor < 86 ? 32 : sizeof(nvmlProcessInfo_t);
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t handle, unsigned *count, nvmlProcessInfo_t *infos)
{
    return list("nvmlDeviceGetComputeRunningProcesses_v3", handle, 0, count, infos, third_version_element());
}

nvmlReturn_t nvmlDeviceGetGraphicsRunningProcesses_v3(nvmlDevice_t handle, unsigned *count, nvmlProcessInfo_t *infos)
{
    return list("nvmlDeviceGetGraphicsRunningProcesses_v3", handle, 1, count, infos, third_version_element());
}
#endif

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t handle, unsigned *count, nvmlProcessInfo_t *infos)
{
    return list("nvmlDeviceGetComputeRunningProcesses_v2", handle, 0, count, infos, sizeof *infos);
}

nvmlReturn_t nvmlDeviceGetGraphicsRunningProcesses_v2(nvmlDevice_t handle, unsigned *count, nvmlProcessInfo_t *infos)
{
    return list("nvmlDeviceGetGraphicsRunningProcesses_v2", handle, 1, count, infos, sizeof *infos);
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses(nvmlDevice_t handle, unsigned *count, nvmlProcessInfo_v1_t *infos)
{
    return list("nvmlDeviceGetComputeRunningProcesses", handle, 0, count, infos, sizeof *infos);
}
