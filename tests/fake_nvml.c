/* A stand-in for libnvidia-ml.so.1 that behaves as it is told: the tests' GPUs.
 *
 * What it is told is a text of words, set by fake_set() or by FAKE_NVML in the environment:
 *   count=N            GPUs (8)          init=CODE      what nvmlInit_v2 returns
 *   mig=I              GPU I is sliced   fail=NAME:I:CODE   a function fails for GPU I, or * for all
 *   hang=FILE          utilisation blocks while FILE exists
 *   grow               a process starts between two calls      denied   no list of a sliced GPU
 *   unknown            the memory of processes is unknown
 * -DOLD leaves out the versioned functions, -DODD writes processes of 32 bytes, as early 530s did.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MIB (1ull << 20)
#define GPUS 64
#define SLOTS 7

typedef struct { int index, slot; } device;  /* slot: -1 is the whole GPU */
static device whole[GPUS], part[GPUS][SLOTS];
static char told[4096];
static int sessions, inits, calls, lists;

void fake_set(const char *text) { snprintf(told, sizeof told, " %s ", text); }
int fake_sessions(void) { return sessions; }
int fake_inits(void) { return inits; }
int fake_calls(void) { return calls; }

static const char *word(const char *name) {
    static char found[512];
    char key[64];
    snprintf(key, sizeof key, " %s=", name);
    char *at = strstr(told, key);
    if (!at) return NULL;
    sscanf(at + strlen(key), "%511s", found);
    return found;
}
static int has(const char *name) {
    char key[64];
    snprintf(key, sizeof key, " %s ", name);
    return strstr(told, key) != NULL;
}
static int number(const char *name, int otherwise) {
    const char *text = word(name);
    return text ? atoi(text) : otherwise;
}
static int fails(const char *name, int index) {
    char key[128];
    calls++;
    for (int any = 0; any < 2; any++) {
        if (any) snprintf(key, sizeof key, " fail=%s:*:", name);
        else snprintf(key, sizeof key, " fail=%s:%d:", name, index);
        char *at = strstr(told, key);
        if (at) return atoi(at + strlen(key));
        if (any) snprintf(key, sizeof key, " fail=*:*:");
        else snprintf(key, sizeof key, " fail=*:%d:", index);
        at = strstr(told, key);
        if (at) return atoi(at + strlen(key));
    }
    return 0;
}
#define MAY(name, dev) do { if (!sessions) return 1; \
    int code = fails(name, ((device *)(dev))->index); if (code) return code; } while (0)
#define WHOLE(dev) do { if (((device *)(dev))->slot >= 0) return 3; } while (0)

int nvmlInit_v2(void) {
    if (getenv("FAKE_NVML") && !*told) fake_set(getenv("FAKE_NVML"));
    int code = number("init", 0);
    if (code) return code;
    for (int i = 0; i < GPUS; i++) {
        whole[i] = (device){i, -1};
        for (int j = 0; j < SLOTS; j++) part[i][j] = (device){i, j};
    }
    sessions++, inits++;
    return 0;
}
int nvmlInitWithFlags(unsigned flags) { (void)flags; return nvmlInit_v2(); }
int nvmlShutdown(void) { if (!sessions) return 1; sessions--; return 0; }
const char *nvmlErrorString(int code) { (void)code; return "an error"; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) {
    if (!sessions) return 1;
    snprintf(text, length, "590.48.01");
    return 0;
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    int code = fails("nvmlSystemGetCudaDriverVersion_v2", -1);
    *version = 13010;
    return code;
}
int nvmlDeviceGetCount_v2(unsigned *count) {
    if (!sessions) return 1;
    *count = number("count", 8);
    return fails("nvmlDeviceGetCount_v2", -1);
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **dev) {
    if (!sessions) return 1;
    if (index >= (unsigned)number("count", 8)) return 2;
    *dev = &whole[index];
    return fails("nvmlDeviceGetHandleByIndex_v2", index);
}
static int text_of(device *d, char *text, unsigned length, int uuid) {
    if (uuid && d->slot < 0) snprintf(text, length, "GPU-%08d-aaaa-bbbb-cccc-dddddddddddd", d->index);
    else if (uuid) snprintf(text, length, "MIG-%08d-aaaa-bbbb-cccc-%012d", d->index, d->slot);
    else if (d->slot < 0) snprintf(text, length, "NVIDIA H100 80GB HBM3");
    else snprintf(text, length, "NVIDIA H100 80GB HBM3 MIG 1g.10gb");
    return 0;
}
int nvmlDeviceGetName(void *dev, char *text, unsigned length) {
    MAY("nvmlDeviceGetName", dev);
    return text_of(dev, text, length, 0);
}
int nvmlDeviceGetUUID(void *dev, char *text, unsigned length) {
    MAY("nvmlDeviceGetUUID", dev);
    return text_of(dev, text, length, 1);
}
typedef struct {
    char legacy[16];
    unsigned domain, bus, device, id, subsystem;
    char bus_id[32];
} pci_info;
int nvmlDeviceGetPciInfo_v3(void *dev, pci_info *pci) {
    MAY("nvmlDeviceGetPciInfo_v3", dev);
    WHOLE(dev);
    int i = ((device *)dev)->index;
    memset(pci, 0, sizeof *pci);
    pci->domain = i == 7 ? 9 : 0, pci->bus = 0x0A + i, pci->device = i == 3 ? 9 : 0;
    snprintf(pci->bus_id, sizeof pci->bus_id, "%08X:%02X:%02X.0", pci->domain, pci->bus, pci->device);
    snprintf(pci->legacy, sizeof pci->legacy, "%04X:%02X:%02X.0", pci->domain, pci->bus, pci->device);
    return 0;
}

static uint64_t total_of(device *d) { return (d->slot < 0 ? 81559 : 9984) * MIB; }
static uint64_t used_of(device *d) { return (d->slot < 0 ? d->index * 1000 + 4 : 9 + d->slot) * MIB; }
int nvmlDeviceGetMemoryInfo(void *dev, uint64_t *memory) {
    MAY("nvmlDeviceGetMemoryInfo", dev);
    memory[0] = total_of(dev), memory[2] = used_of(dev) + 479 * MIB, memory[1] = memory[0] - memory[2];
    return 0;
}
int nvmlDeviceGetUtilizationRates(void *dev, unsigned *rates) {
    MAY("nvmlDeviceGetUtilizationRates", dev);
    WHOLE(dev);
    const char *file = word("hang");
    while (file && !access(file, F_OK)) usleep(10000);
    if (number("mig", -1) == ((device *)dev)->index) return 3;
    rates[0] = number("busy", ((device *)dev)->index * 10), rates[1] = 1;
    return 0;
}
#define FIGURE(name, type, value) int name(void *dev, type *out) { \
    MAY(#name, dev); WHOLE(dev); int i = ((device *)dev)->index; (void)i; *out = value; return 0; }
FIGURE(nvmlDeviceGetPowerUsage, unsigned, 100250 + 1000 * i)
FIGURE(nvmlDeviceGetEnforcedPowerLimit, unsigned, 700000)
FIGURE(nvmlDeviceGetTotalEnergyConsumption, uint64_t, 5000000000500ull + i)
FIGURE(nvmlDeviceGetFanSpeed, unsigned, 30 + i)
int nvmlDeviceGetTemperature(void *dev, int sensor, unsigned *out) {
    MAY("nvmlDeviceGetTemperature", dev);
    WHOLE(dev);
    *out = 40 + ((device *)dev)->index;
    return sensor ? 2 : 0;
}
int nvmlDeviceGetClockInfo(void *dev, int kind, unsigned *out) {
    MAY("nvmlDeviceGetClockInfo", dev);
    WHOLE(dev);
    *out = kind == 0 ? 1980 : kind == 2 ? 2619 : 1;
    return 0;
}
int nvmlDeviceGetTotalEccErrors(void *dev, int kind, int counter, uint64_t *out) {
    MAY("nvmlDeviceGetTotalEccErrors", dev);
    WHOLE(dev);
    *out = kind == 1 && counter == 0 ? ((device *)dev)->index : 77;
    return 0;
}
int nvmlDeviceGetMigMode(void *dev, unsigned *current, unsigned *pending) {
    MAY("nvmlDeviceGetMigMode", dev);
    if (!word("mig")) return 3;
    *current = *pending = number("mig", -1) == ((device *)dev)->index;
    return 0;
}
int nvmlDeviceGetMaxMigDeviceCount(void *dev, unsigned *count) { (void)dev; *count = SLOTS; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *dev, unsigned slot, void **out) {
    MAY("nvmlDeviceGetMigDeviceHandleByIndex", dev);
    if (slot >= SLOTS) return 2;
    if (slot % 2) return 6;  /* the slots have holes */
    *out = &part[((device *)dev)->index][slot];
    return 0;
}

/* GPU i runs i processes; those of a sliced one sit in its first slice. */
static int list_of(device *d, unsigned *count, char *rows, size_t size) {
    if (!sessions) return 1;
    int sliced = number("mig", -1) == d->index, have = d->slot > 0 ? 0 : d->index;
    if (sliced && d->slot < 0 && has("denied")) return 4;
    if (has("grow") && lists++ == 0) have--;
    unsigned room = *count;
    *count = have;
    if (have > 0 && room < (unsigned)have) return 7;
    for (int k = 0; k < have; k++, rows += size) {
        uint64_t used = has("unknown") ? ~0ull : (uint64_t)(k + 1) * 100 * MIB;
        memset(rows, 0xEE, size);
        *(uint32_t *)rows = 1000 * (d->index + 1) + k;
        *(uint64_t *)(rows + 8) = used;
    }
    return 0;
}
int nvmlDeviceGetComputeRunningProcesses(void *dev, unsigned *count, void *rows) {
    MAY("nvmlDeviceGetComputeRunningProcesses", dev);
    return list_of(dev, count, rows, 16);
}
#ifndef OLD
typedef struct { unsigned version; uint64_t total, reserved, free, used; } memory_v2;
int nvmlDeviceGetMemoryInfo_v2(void *dev, memory_v2 *memory) {
    MAY("nvmlDeviceGetMemoryInfo_v2", dev);
    if (memory->version != (sizeof *memory | 2u << 24)) return 25;
    memory->total = total_of(dev), memory->reserved = 479 * MIB, memory->used = used_of(dev);
    memory->free = memory->total - memory->reserved - memory->used;
    return 0;
}
typedef struct { unsigned version, sensor; int temperature; } temperature_v;
int nvmlDeviceGetTemperatureV(void *dev, temperature_v *out) {
    MAY("nvmlDeviceGetTemperatureV", dev);
    WHOLE(dev);
    if (out->version != (sizeof *out | 1u << 24)) return 25;
    out->temperature = 40 + ((device *)dev)->index;
    return out->sensor ? 2 : 0;
}
int nvmlDeviceGetComputeRunningProcesses_v2(void *dev, unsigned *count, void *rows) {
    MAY("nvmlDeviceGetComputeRunningProcesses_v2", dev);
    return list_of(dev, count, rows, 24);
}
int nvmlDeviceGetConfComputeMemSizeInfo(void *dev, void *out) { (void)dev, (void)out; return 3; }
int nvmlDeviceGetComputeRunningProcesses_v3(void *dev, unsigned *count, void *rows) {
    MAY("nvmlDeviceGetComputeRunningProcesses_v3", dev);
#ifdef ODD
    return list_of(dev, count, rows, 32);
}
#else
    return list_of(dev, count, rows, 24);
}
int nvmlDeviceGetRunningProcessDetailList(void *dev, void *list) { (void)dev, (void)list; return 3; }
#endif
#endif
