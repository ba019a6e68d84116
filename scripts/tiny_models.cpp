// Writes the headers of tiny models: those of llama.cpp's own architecture test (compiled in), with other hyper-parameters.
//
// A line on stdin is a model: `ARCHITECTURE dense|moe PATH [LAYERS [KEY=NUMBER ...]]`. KEY is one after `ARCHITECTURE.`, or
// `vocabulary`, or `raw`, which saves the keys given here and not what llama.cpp makes of them, or `without`, which leaves out the
// tensors of that name, or `mtp`, which makes the last layer one that predicts, or `own`, which adds the token embeddings that a
// draft head may share with its model; NUMBER may be a list, or `-` to leave the key out.
// Lists with an entry per layer are repeated to the new length. Each model is made in a child of its own, because impossible ones
// abort. With an argument the architectures are listed: name, experts mandatory, experts possible.
//
// Built by ground_truth.py against the libraries of a llama.cpp build.

#define main static unused_main
#include "../tests/test-llama-archs.cpp"
#undef main

#include "llama-model.h"
#include <iostream>
#include <memory>
#include <sstream>
#include <sys/wait.h>
#include <unistd.h>

static void leave_empty(ggml_tensor *, void *) {}

static void set_number(gguf_context * keys, const std::string & key, double value) {
    const int64_t id = gguf_find_key(keys, key.c_str());
    const bool absent_float = key.find("scale") != std::string::npos || key.find("softcapping") != std::string::npos;
    const bool absent_bool = key.find("_norm") != std::string::npos;
    const gguf_type type = id >= 0 ? gguf_get_kv_type(keys, id) : absent_float ? GGUF_TYPE_FLOAT32 : absent_bool ? GGUF_TYPE_BOOL : GGUF_TYPE_UINT32;
    switch (type) {
        case GGUF_TYPE_FLOAT32: gguf_set_val_f32(keys, key.c_str(), value); break;
        case GGUF_TYPE_BOOL: gguf_set_val_bool(keys, key.c_str(), value != 0); break;
        default: gguf_set_val_u32(keys, key.c_str(), value); break;
    }
}

static void set_vocabulary(gguf_context * keys, const std::string & prefix, size_t size) {
    std::vector<std::string> tokens;
    std::vector<const char *> texts;
    for (size_t i = 0; i < size; i++) {
        tokens.push_back("tok_" + std::to_string(i));
    }
    for (const std::string & token : tokens) {
        texts.push_back(token.c_str());
    }
    const std::vector<float> scores(size, 0.0f);
    gguf_set_arr_str(keys, "tokenizer.ggml.tokens", texts.data(), size);
    gguf_set_arr_data(keys, "tokenizer.ggml.scores", GGUF_TYPE_FLOAT32, scores.data(), size);
    set_number(keys, prefix + "vocab_size", size);
}

static uint32_t number_of(const gguf_context * keys, const std::string & key) {
    return gguf_get_val_u32(keys, gguf_find_key(keys, key.c_str()));
}

static void add_tensor(gguf_context * header, const std::string & name, int64_t rows, int64_t columns) {
    ggml_context_ptr context(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
    ggml_tensor * tensor = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, rows, columns);
    ggml_set_name(tensor, name.c_str());
    gguf_add_tensor(header, tensor);
}

// Makes the last layer a block of multi-token prediction: llama.cpp makes no such models itself, because it skips their tensors.
static void set_prediction_layer(gguf_context * header, const std::string & prefix) {
    const int64_t n_embd = number_of(header, prefix + "embedding_length");
    const std::string layer = "blk." + std::to_string(number_of(header, prefix + "block_count") - 1) + ".nextn.";
    set_number(header, prefix + "nextn_predict_layers", 1);
    add_tensor(header, layer + "eh_proj.weight", 2*n_embd, n_embd);
    for (const char * norm : { "enorm", "hnorm", "shared_head_norm" }) {
        add_tensor(header, layer + norm + ".weight", n_embd, 1);
    }
}

// Repeats every list with an entry per layer.
static void set_layers(gguf_context * keys, const std::string & prefix, size_t from, size_t to) {
    for (int64_t id = 0; id < gguf_get_n_kv(keys); id++) {
        const std::string key = gguf_get_key(keys, id);
        if (key.rfind(prefix, 0) != 0 || gguf_get_kv_type(keys, id) != GGUF_TYPE_ARRAY || gguf_get_arr_n(keys, id) != from ||
            gguf_get_arr_type(keys, id) == GGUF_TYPE_STRING || key.find("ple.") != std::string::npos ||
            key.find("rope.dimension_sections") != std::string::npos) {
            continue;
        }
        const gguf_type type = gguf_get_arr_type(keys, id);
        const size_t size = type == GGUF_TYPE_BOOL ? 1 : type == GGUF_TYPE_UINT64 ? 8 : 4;
        const char * old = (const char *) gguf_get_arr_data(keys, id);
        std::vector<char> data;
        for (size_t il = 0; il < to; il++) {
            data.insert(data.end(), old + il % from * size, old + il % from * size + size);
        }
        gguf_set_arr_data(keys, key.c_str(), type, data.data(), to);
        id = -1;
        if (to == from) {
            return;
        }
    }
    set_number(keys, prefix + "block_count", to);
}

// The header as llama.cpp saves it, or (where it cannot) with the keys the model was made from, and the full length: the
// weights are a hole.
static void write_header(const llama_model * model, const gguf_context * keys, bool saves, const std::string & without, const std::string & predicts, const std::string & owns, const std::string & path) {
    gguf_context_ptr own(gguf_init_empty());
    gguf_context * header = own.get();
    std::unique_ptr<llama_model_saver> saver;
    if (saves) {
        saver = std::make_unique<llama_model_saver>(model);
        saver->add_kv_from_model();
        header = saver->gguf_ctx;
    } else {
        gguf_set_kv(header, keys);
    }
    if (saves && without.empty() && predicts.empty()) {
        saver->add_tensors_from_model();
    } else {
        const std::string last = "blk." + std::to_string(llama_model_n_layer(model) - 1) + ".";
        for (const auto & [name, tensor] : llama_internal_get_tensor_map(model)) {
            const bool left_out = !without.empty() && name.find("." + without + ".") != std::string::npos;
            const bool has_no_part = !predicts.empty() && name.rfind(last, 0) == 0 && name.find("scale") != std::string::npos;
            if (!left_out && !has_no_part && gguf_find_tensor(header, name.c_str()) < 0) {
                gguf_add_tensor(header, tensor);
            }
        }
    }
    if (!predicts.empty()) {
        set_prediction_layer(header, predicts);
    }
    if (!owns.empty()) {
        const int64_t tokens = gguf_get_arr_n(keys, gguf_find_key(keys, "tokenizer.ggml.tokens"));
        add_tensor(header, "token_embd.weight", number_of(keys, owns + "embedding_length"), tokens);
    }
    gguf_write_to_file(header, path.c_str(), true);
    size_t length = gguf_get_meta_size(header);
    for (int64_t i = 0; i < gguf_get_n_tensors(header); i++) {
        length = std::max(length, gguf_get_meta_size(header) + gguf_get_tensor_offset(header, i) + GGML_PAD(gguf_get_tensor_size(header, i), 32));
    }
    if (truncate(path.c_str(), length) != 0) {
        throw std::runtime_error("cannot set the length of " + path);
    }
}

static int write_one(const std::string & line) {
    std::istringstream words(line);
    std::string name, kind, path, setting;
    size_t layers = 0;
    words >> name >> kind >> path >> layers;
    std::string without, predicts, owns;
    bool saves = true;
    for (const llm_arch & arch : llm_arch_all()) {
        if (name != llm_arch_name(arch)) {
            continue;
        }
        const std::string prefix = name + ".";
        gguf_context_ptr keys = get_gguf_ctx(arch, kind == "moe");
        const size_t old = gguf_get_val_u32(keys.get(), gguf_find_key(keys.get(), (prefix + "block_count").c_str()));
        if (layers > 0) {
            set_layers(keys.get(), prefix, old, layers);
        }
        while (words >> setting) {
            const size_t equals = setting.find('=');
            const std::string key = setting.substr(0, equals);
            const std::string text = setting.substr(equals + 1);
            if (key == "raw") {
                saves = false;
            } else if (key == "without") {
                without = text;
            } else if (key == "mtp") {
                predicts = prefix;
            } else if (key == "own") {
                owns = prefix;
            } else if (key == "vocabulary") {
                set_vocabulary(keys.get(), prefix, std::stoul(text));
            } else if (text.find(',') != std::string::npos) {
                std::vector<uint32_t> list;
                std::istringstream numbers(text);
                for (std::string number; std::getline(numbers, number, ',');) {
                    if (!number.empty()) {
                        list.push_back(std::stoul(number));
                    }
                }
                gguf_set_arr_data(keys.get(), (prefix + key).c_str(), GGUF_TYPE_UINT32, list.data(), list.size());
            } else if (text == "-") {
                gguf_remove_key(keys.get(), (prefix + key).c_str());
            } else {
                set_number(keys.get(), key.rfind("tokenizer.", 0) == 0 ? key : prefix + key, std::stod(text));
            }
        }
        saves = saves && llama_model_saver_supports_arch(arch);
        llama_model_params params = llama_model_default_params();
        ggml_backend_dev_t devices[] = { nullptr };
        params.devices = devices;
        llama_model * model = llama_model_init_from_user(keys.get(), leave_empty, nullptr, params);
        if (model == nullptr) {
            return 1;
        }
        write_header(model, keys.get(), saves, without, predicts, owns, path);
        return 0;
    }
    return 2;
}

int main(int argc, char **) {
    if (argc > 1) {
        for (const llm_arch & arch : llm_arch_all()) {
            printf("%s %d %d\n", llm_arch_name(arch), moe_mandatory(arch), moe_implemented(arch));
        }
        return 0;
    }
    for (std::string line; std::getline(std::cin, line);) {
        const pid_t child = fork();
        if (child == 0) {
            int status = 1;
            try {
                status = write_one(line);
            } catch (const std::exception & error) {
                fprintf(stderr, "%s: %s\n", line.c_str(), error.what());
            }
            _exit(status);
        }
        int status = 0;
        waitpid(child, &status, 0);
        printf("%d %s\n", WIFEXITED(status) ? WEXITSTATUS(status) : -1, line.c_str());
        fflush(stdout);
    }
}
