// Prints what llama.cpp projects for each line of arguments on stdin, in bytes, as one JSON object a line.
//
// The dry run is llama.cpp's own (common/fit.cpp): the model is loaded with no_alloc, the context is planned, and
// nothing is allocated. Each line runs in a child of its own, because backends and devices are global.
//
// Built by ground_truth.py against the libraries of a llama.cpp build.

#include "arg.h"
#include "common.h"
#include "llama.h"
#include "log.h"
#include "../src/llama-ext.h"

#include <cstdio>
#include <cstring>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

static void print_sizes(const char * name, const llama_memory_breakdown_data & sizes, const char * end) {
    printf("\"%s\":{\"weights\":%zu,\"context\":%zu,\"compute\":%zu}%s", name, sizes.model, sizes.context, sizes.compute, end);
}

static int project(const std::string & line) {
    std::istringstream words(line);
    std::vector<std::string> args = { "ground_truth" };
    uint32_t max_outputs = 0;
    for (std::string word; words >> word;) {
        if (word == "--max-outputs") {  // no flag of llama.cpp's: its server sets this by the number of slots
            words >> max_outputs;
        } else {
            args.push_back(word);
        }
    }
    std::vector<char *> argv;
    for (std::string & arg : args) {
        argv.push_back(arg.data());
    }

    common_params params;
    common_init();
    common_log_set_verbosity_thold(-1);
    if (!common_params_parse((int) argv.size(), argv.data(), params, LLAMA_EXAMPLE_SERVER)) {
        return 1;
    }
    llama_backend_init();
    llama_model_params model_params = common_model_params_to_llama(params);
    llama_context_params context_params = common_context_params_to_llama(params);
    context_params.n_outputs_max = max_outputs;
    model_params.no_alloc = true;
    model_params.load_mode = LLAMA_LOAD_MODE_NONE;

    llama_model * model = llama_model_load_from_file(params.model.path.c_str(), model_params);
    if (model == nullptr) {
        return 2;
    }
    llama_context * context = llama_init_from_model(model, context_params);
    if (context == nullptr) {
        return 3;
    }

    const int devices = llama_model_n_devices(model);
    std::vector<llama_memory_breakdown_data> device_sizes(devices);
    llama_memory_breakdown_data host = {};
    llama_memory_breakdown_data other = {};
    for (const auto & [type, sizes] : llama_get_memory_breakdown(context)) {
        llama_memory_breakdown_data * sum = ggml_backend_buft_is_host(type) ? &host : &other;
        ggml_backend_dev_t device = ggml_backend_buft_get_device(type);
        for (int i = 0; i < devices && !ggml_backend_buft_is_host(type); i++) {
            if (llama_model_get_device(model, i) == device) {
                sum = &device_sizes[i];
            }
        }
        sum->model += sizes.model;
        sum->context += sizes.context;
        sum->compute += sizes.compute;
    }
    printf("{");
    for (int i = 0; i < devices; i++) {
        print_sizes(("device" + std::to_string(i)).c_str(), device_sizes[i], ",");
    }
    print_sizes("host", host, ",");
    print_sizes("repacked", other, "}\n");
    fflush(stdout);
    _exit(0);
}

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        fflush(stdout);
        const pid_t child = fork();
        if (child == 0) {
            _exit(project(line));
        }
        int status = 0;
        waitpid(child, &status, 0);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
            printf("{\"refused\":%d}\n", WIFEXITED(status) ? WEXITSTATUS(status) : -1);
        }
    }
}
