#include "state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void copy_text(char *target, const char *line, const char *word, size_t size)
{
    const char *value = line + strlen(word);
    while (*value == ' ')
        value++;
    snprintf(target, size, "%s", value);
}

static int read_rule(struct rules *rules, const char *word, const char *line)
{
    if (rules->count == MOST_RULES)
        return 0;
    struct rule *rule = &rules->list[rules->count];
    rule->value = 0;
    if (strcmp(word, "error") == 0)
        rule->kind = RULE_ERROR;
    else if (strcmp(word, "hang") == 0)
        rule->kind = RULE_HANG;
    else if (strcmp(word, "slow") == 0)
        rule->kind = RULE_SLOW;
    else
        return 0;
    if (sscanf(line, "%*s %127s %u", rule->call, &rule->value) < 1)
        return 0;
    rules->count++;
    return 1;
}

static void read_process(struct device *device, const char *line)
{
    char kind[TEXT], bytes[TEXT];
    unsigned pid;
    if (device->process_count == MOST_PROCESSES)
        return;
    if (sscanf(line, "process %127s %u %127s", kind, &pid, bytes) != 3)
        return;
    struct process *process = &device->processes[device->process_count++];
    process->pid = pid;
    process->graphics = strcmp(kind, "graphics") == 0;
    process->bytes = strcmp(bytes, "unknown") == 0 ? ~0ULL : strtoull(bytes, NULL, 10);
}

static void read_device_line(struct device *device, const char *word, const char *line)
{
    if (strcmp(word, "uuid") == 0)
        copy_text(device->uuid, line, word, sizeof device->uuid);
    else if (strcmp(word, "name") == 0)
        copy_text(device->name, line, word, sizeof device->name);
    else if (strcmp(word, "pci") == 0)
        copy_text(device->pci, line, word, sizeof device->pci);
    else if (strcmp(word, "memory") == 0)
        device->has_memory = sscanf(line, "memory %llu %llu %llu %llu", &device->total, &device->reserved,
                                    &device->free, &device->used) == 4;
    else if (strcmp(word, "utilization") == 0)
        device->has_utilization =
            sscanf(line, "utilization %u %u", &device->utilization, &device->memory_utilization) >= 1;
    else if (strcmp(word, "temperature") == 0)
        device->has_temperature = sscanf(line, "temperature %u", &device->temperature) == 1;
    else if (strcmp(word, "milliwatts") == 0)
        device->has_power = sscanf(line, "milliwatts %u", &device->milliwatts) == 1;
    else if (strcmp(word, "capability") == 0)
        device->has_capability = sscanf(line, "capability %d %d", &device->major, &device->minor) == 2;
    else if (strcmp(word, "numa") == 0)
        device->has_numa = sscanf(line, "numa %u", &device->numa) == 1;
    else if (strcmp(word, "nvlink") == 0 && device->link_count < MOST_LINKS)
        copy_text(device->links[device->link_count++], line, word, TEXT);
    else if (strcmp(word, "throttle") == 0)
        sscanf(line, "throttle %llu", &device->throttle);
    else if (strcmp(word, "growth") == 0)
        sscanf(line, "growth %u %u", &device->growth, &device->growth_times);
    else if (strcmp(word, "mig_slots") == 0)
        sscanf(line, "mig_slots %u", &device->mig_slots);
    else if (strcmp(word, "slot") == 0)
        sscanf(line, "slot %u", &device->slot);
    else if (strcmp(word, "null_handle") == 0)
        device->null_handle = 1;
    else if (strcmp(word, "process") == 0)
        read_process(device, line);
    else
        read_rule(&device->rules, word, line);
}

struct state *read_state(const char *path)
{
    FILE *file = fopen(path, "r");
    if (!file)
        return NULL;
    struct state *state = calloc(1, sizeof *state);
    struct device *device = NULL;
    char line[1024];
    while (state && fgets(line, sizeof line, file)) {
        char word[TEXT];
        line[strcspn(line, "\n")] = 0;
        if (sscanf(line, "%127s", word) != 1)
            continue;
        if (strcmp(word, "[gpu]") == 0 && state->gpu_count < MOST_GPUS) {
            device = &state->gpus[state->gpu_count++];
            device->parent = -1;
        } else if (strcmp(word, "[mig]") == 0 && state->gpu_count > 0 &&
                   state->mig_count < MOST_GPUS * MOST_SLOTS) {
            device = &state->migs[state->mig_count++];
            device->parent = state->gpu_count - 1;
        } else if (device) {
            read_device_line(device, word, line);
        } else if (strcmp(word, "driver") == 0) {
            copy_text(state->driver, line, word, sizeof state->driver);
        } else if (strcmp(word, "nvml") == 0) {
            copy_text(state->nvml, line, word, sizeof state->nvml);
        } else if (strcmp(word, "journal") == 0) {
            copy_text(state->journal, line, word, sizeof state->journal);
        } else {
            read_rule(&state->rules, word, line);
        }
    }
    fclose(file);
    return state;
}
