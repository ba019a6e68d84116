/* The state file of the fake NVML library, and what was read from it.
 *
 * Line by line: a word, then its values. Lines before the first [gpu] concern the library, lines
 * after a [gpu] that GPU, lines after a [mig] a MIG device of the GPU above it.
 *
 *   driver 580.95.05            nvml 13.580.95.05         journal /path/of/a/file
 *   error nvmlInit_v2 9         hang nvmlInit_v2          slow nvmlInit_v2 200
 *   [gpu]
 *   uuid GPU-…                  name NVIDIA …             pci 00000000:01:00.0
 *   memory TOTAL RESERVED FREE USED                       capability 8 9
 *   utilization 12 3            temperature 45            milliwatts 61000
 *   throttle 64                 numa 1
 *   nvlink 00000000:02:00.0     the next link is up and leads there
 *   process compute PID BYTES   process graphics PID unknown
 *   growth BY TIMES             the first TIMES sizing calls say BY processes too few
 *   mig_slots 7                 MIG mode is on, with that many places
 *   null_handle                 handles of this GPU are NULL, with success
 *   error CALL CODE             CALL is a symbol of NVML or *; so are those of
 *   hang CALL                   (until the line is gone) and
 *   slow CALL MILLISECONDS
 *   [mig]
 *   slot 2                      and uuid, name, memory, process, error, … as above
 */
#ifndef FAKE_NVML_STATE_H
#define FAKE_NVML_STATE_H

enum { MOST_GPUS = 32, MOST_SLOTS = 16, MOST_PROCESSES = 64, MOST_RULES = 32, MOST_LINKS = 18, TEXT = 128 };

enum rule_kind { RULE_ERROR, RULE_HANG, RULE_SLOW };

struct rule {
    enum rule_kind kind;
    char call[TEXT];
    unsigned value;
};

struct process {
    unsigned pid;
    unsigned long long bytes;
    int graphics;
};

struct rules {
    struct rule list[MOST_RULES];
    int count;
};

struct device {
    char uuid[TEXT], name[TEXT], pci[TEXT];
    unsigned long long total, reserved, free, used, throttle;
    int has_memory, has_utilization, has_temperature, has_power, has_capability, has_numa;
    unsigned utilization, memory_utilization, temperature, milliwatts, numa;
    int major, minor, null_handle;
    unsigned growth, growth_times;
    unsigned slot, mig_slots;
    struct process processes[MOST_PROCESSES];
    int process_count;
    char links[MOST_LINKS][TEXT];
    unsigned link_count;
    struct rules rules;
    int parent; /* index of the physical GPU of a MIG device, else -1 */
};

struct state {
    char driver[TEXT], nvml[TEXT], journal[1024];
    struct rules rules;
    struct device gpus[MOST_GPUS];
    int gpu_count;
    struct device migs[MOST_GPUS * MOST_SLOTS];
    int mig_count;
};

/* Reads the file; NULL if there is none. The caller frees. */
struct state *read_state(const char *path);

#endif
