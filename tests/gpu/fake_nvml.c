/* A libnvidia-ml.so.1 for tests: enough of NVML for turbodiff/gpu/sample.py, told by FAKE_NVML what to be.
 * Return codes: 3 not supported, 4 no permission, 7 insufficient size, 9 driver not loaded, 15 GPU is lost, 18 library
 * version mismatch. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; } process;

static int is(const char *name) { const char *mode = getenv("FAKE_NVML"); return mode && !strcmp(mode, name); }
static int is_mig(void) { return is("mig") || is("mig_old") || is("mig_nameless"); }
static unsigned long long gib(double x) { return (unsigned long long)(x * (1ull << 30)); }

int nvmlInitWithFlags(unsigned flags) {
    static int calls;
    if (is("hang") || (is("hang_later") && calls++)) for (;;) pause();
    if (is("slow_two") && !calls++) sleep(3); /* eight cards without persistence mode */
    if (is("floods")) for (;;) puts("garbage of a library");
    if (is("talks")) { printf("half a line"); fflush(stdout); fprintf(stderr, "nvml: a warning\n"); }
    if (is("leaves")) { puts("no licence for this"); puts("second line"); exit(0); }
    if (is("crash")) abort();
    return is("mismatch") ? 18 : is("no_driver") ? 9 : is("no_permission") ? 4 : is("unknown_error") ? 999 : 0;
}
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 18 ? "Driver/library version mismatch" : "fake error"; }
int nvmlSystemGetDriverVersion(char *out, unsigned n) { strncpy(out, "580.82.07", n); return 0; }
int nvmlDeviceGetCount_v2(unsigned *out) { *out = is("two") || is("two_no_list") || is("slow_two") ? 2 : 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **out) { *out = (void *)(long)(i + 1); return is("lost") ? 15 : 0; }
int nvmlDeviceGetMigMode(void *d, unsigned *now, unsigned *next) { *now = *next = is_mig(); return is_mig() ? 0 : 3; }
int nvmlDeviceGetMaxMigDeviceCount(void *d, unsigned *out) { *out = 7; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *d, unsigned i, void **out) { *out = (void *)(long)(i + 100); return i < 2 ? 0 : 6; }
int nvmlDeviceGetGpuInstanceId(void *d, unsigned *out) { *out = (long)d - 99; return (long)d < 100 || is("mig_nameless") ? 3 : 0; }
int nvmlDeviceGetComputeInstanceId(void *d, unsigned *out) { *out = 0; return (long)d < 100 || is("mig_nameless") ? 3 : 0; }
int nvmlDeviceGetName(void *d, char *out, unsigned n) { strncpy(out, "NVIDIA GeForce RTX 4090", n); return 0; }
int nvmlDeviceGetUUID(void *d, char *out, unsigned n) {
    static const char *names[] = {"GPU-aaaa", "GPU-bbbb"}, *parts[] = {"MIG-1111", "MIG-2222"};
    static const char *old_parts[] = {"MIG-GPU-aaaa/1/0", "MIG-GPU-aaaa/2/0"}; /* drivers before 470 */
    long i = (long)d;
    strncpy(out, i < 100 ? names[i - 1] : is("mig") ? parts[i - 100] : old_parts[i - 100], n);
    return 0;
}
int nvmlDeviceGetMinorNumber(void *d, unsigned *out) { *out = (unsigned)(long)d - 1; return (long)d >= 100 ? 3 : 0; }
int nvmlDeviceGetCudaComputeCapability(void *d, int *major, int *minor) { *major = 8; *minor = 9; return 0; }
int nvmlDeviceGetUtilizationRates(void *d, unsigned *out) { out[0] = 40; out[1] = 10; return is_mig() ? 3 : 0; }
int nvmlDeviceGetPowerUsage(void *d, unsigned *out) { *out = 123000; return 0; }
int nvmlDeviceGetDisplayActive(void *d, unsigned *out) { *out = 1; return 0; }
int nvmlDeviceGetMemoryInfo_v2(void *d, memory_v2 *m) {
    if (is("hang_in_memory")) for (;;) pause();
    if (is("na_memory") || is("old_driver")) return 3;
    m->total = gib((long)d >= 100 ? 10 : 23.5); m->reserved = gib(0.5);
    m->used = gib((long)d == 2 ? 1 : 3); m->free = m->total - m->reserved - m->used;
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *d, memory_v1 *m) {
    if (is("na_memory")) return 3;
    m->total = gib(23.5); m->used = gib(3.5); m->free = gib(20);
    return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *d, unsigned *count, process *out) {
    if (is("no_list") || is("two_no_list")) return 3;
    if (is("empty")) { *count = 0; return 0; }
    if (!out || *count < 2) { *count = 2; return 7; }
    const char *pid = getenv("FAKE_NVML_PID");
    process mine = {pid ? (unsigned)atoi(pid) : 1, gib(2), 0, 0}, other = {2, gib(0.5), 0, 0};
    process garbage = {0xfffffff0u, gib(900), 0, 0}, nonsense = {0x7ffffff1u, gib(800), 0, 0};
    out[0] = is("garbage") ? garbage : mine;
    out[1] = is("garbage") ? nonsense : other;
    *count = 2;
    return 0;
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *d, unsigned *count, process *out) { *count = 0; return 0; }

/* what a card's speed is made of; older drivers know none of it */
typedef struct { unsigned sms, copy_engines, decoders, encoders, jpegs, ofas, gpu_slices, compute_slices; unsigned long long memory_mb; } attributes;
int nvmlDeviceGetAttributes_v2(void *d, attributes *out) { if ((long)d < 100) return 3; memset(out, 0, sizeof *out); out->sms = 14; return 0; }
int nvmlDeviceGetNumGpuCores(void *d, unsigned *out) { *out = 16384; return is("old_driver") || (long)d >= 100 ? 3 : 0; }
int nvmlDeviceGetMaxClockInfo(void *d, unsigned kind, unsigned *out) { *out = kind == 1 ? 3105 : 10501; return is("old_driver") ? 3 : 0; }
int nvmlDeviceGetMemoryBusWidth(void *d, unsigned *out) { *out = 384; return is("old_driver") ? 3 : 0; }
int nvmlDeviceGetCurrPcieLinkWidth(void *d, unsigned *out) { *out = is("riser") ? 4 : 16; return is("old_driver") ? 3 : 0; }
int nvmlDeviceGetMaxPcieLinkGeneration(void *d, unsigned *out) { *out = 4; return is("old_driver") ? 3 : 0; }
int nvmlDeviceGetVirtualizationMode(void *d, unsigned *out) { *out = is("vgpu") ? 2 : 0; return is("old_driver") ? 3 : 0; }
