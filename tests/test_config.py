"""Configuration: three file formats, the environment and flags, and errors that say where."""

from pathlib import Path

import pytest

from llama_gpu.config import Config, environment_names, load_config
from llama_gpu.errors import ConfigError, LlamaGpuError

# The settings that files of Llama-Smart-Proxy carry, as such a file writes them.
SMART_PROXY_JSON = """{
  "backend": "llama.cpp",
  "server_pool": {
    "size": 2, "host": "localhost", "port_start": 11601,
    "gpu_layers": 99, "request_timeout": 300, "health_timeout": 120
  },
  "server": {"host": "0.0.0.0", "port": 11555},
  "gpu": {
    "enabled": true, "enable_gpu_monitoring": true,
    "allocation_strategy": "single-gpu-preferred", "gpu_allocation_strategy": "distribute",
    "monitoring_interval": 2.5, "cpu_fallback": true, "kv_offload": true
  },
  "models": {"Qwen3-0.6B": {"repo": "unsloth/Qwen3-0.6B-GGUF", "variant": "Q4_K_M"}},
  "agents": []
}"""


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> Path:
        file = tmp_path / name
        file.write_text(text)
        return file

    return write


def load(path=None, overrides=None, **environment) -> Config:
    return load_config(path, overrides, environment=environment)


def test_without_a_file_the_defaults_are_safe():
    config = load()
    assert config.server.host == "127.0.0.1"
    assert config.warnings == ()
    assert config.gpu.serves_without_gpu
    assert config.gpu.cpu_policy == "never"


def test_the_three_formats_say_the_same(write):
    yaml = write(
        "a.yaml",
        "models_dir: /m\nserver: {port: 9000}\nmodels:\n  'qwen*':\n    flash_attention: on\n    gpus: 0\n",
    )
    toml = write(
        "a.toml",
        'models_dirs = ["/m"]\nserver.port = 9000\n[models."qwen*"]\nflash_attention = "on"\ngpus = [0]\n',
    )
    json = write(
        "a.json",
        '{"models_dirs": ["/m"],\n\t"server": {"port": 9000},\n'
        '\t"models": {"qwen*": {"flash_attention": "on", "gpus": [0]}}}',
    )
    assert load(yaml) == load(toml) == load(json)
    assert load(yaml).options_for("Qwen3-8B").flash_attention == "on"


def test_a_smart_proxy_file_means_what_it_meant(write):
    config = load(write("config.json", SMART_PROXY_JSON))
    assert (config.server.host, config.server.port) == ("0.0.0.0", 11555)
    assert (config.server_pool.size, config.server_pool.port_start) == (2, 11601)
    assert config.server_pool.bind_host == "127.0.0.1"
    assert config.gpu.strategy == "distribute"
    assert config.gpu.monitoring_interval == 2.5
    options = config.options_for("anything")
    assert (options.gpu_layers, options.cpu, options.start_timeout_seconds) == (99, "allow", 120)


def test_what_a_smart_proxy_file_carries_in_vain_is_said_and_not_refused(write):
    warnings = "\n".join(load(write("config.json", SMART_PROXY_JSON)).warnings)
    for key in ("agents", "gpu.kv_offload", "models.Qwen3-0.6B.repo", "server.host 0.0.0.0"):
        assert key in warnings
    assert "line 13" in warnings


def test_another_backend_is_refused(write):
    with pytest.raises(ConfigError, match="is served") as caught:
        load(write("config.json", '{"backend": "ollama"}'))
    assert caught.value.key == "backend"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.yaml", "server:\n  host: 127.0.0.1\n  prot: 1\n"),
        ("c.toml", '[server]\nhost = "127.0.0.1"\nprot = 1\n'),
        ("c.json", '{"server": {\n\t"host": "127.0.0.1",\n\t"prot": 1}}'),
    ],
)
def test_an_unknown_key_is_named_with_its_line_and_the_nearest_known_one(write, name, text):
    file = write(name, text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value) == f'{file}, line 3: unknown key "server.prot"; did you mean "server.port"?'
    assert caught.value.key == "server.prot"
    assert caught.value.source == f"{file}, line 3"
    assert isinstance(caught.value, LlamaGpuError)


def test_an_unknown_option_of_a_model_is_named_with_the_nearest_known_one(write):
    with pytest.raises(
        ConfigError, match=r'line 3: unknown key "models.qwen\*.contxt_length"; did you mean '
    ):
        load(write("c.yaml", "models:\n  qwen*:\n    contxt_length: 1\n"))


def test_a_key_in_the_wrong_section_is_shown_the_right_one(write):
    with pytest.raises(
        ConfigError, match=r'unknown key "context_length"; did you mean "defaults\.context_length"'
    ):
        load(write("c.yaml", "context_length: 1\n"))


def test_a_key_like_no_other_is_answered_with_all_that_are_known(write):
    with pytest.raises(ConfigError, match=r'unknown key "log\.zzz"; known here: format, level'):
        load(write("c.yaml", "log: {zzz: 1}\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("server:\n  port: 70000\n", "line 2: server.port = 70000 should be less than or equal to 65535"),
        ("server: 8080\n", "line 1: server = 8080 should be a "),
        (
            "defaults:\n  cpu: maybe\n",
            "line 2: defaults.cpu = 'maybe' should be 'never', 'partial' or 'allow'",
        ),
        (
            "defaults:\n  cpu_moe_layers: some\n",
            "line 2: defaults.cpu_moe_layers = 'some' should be a valid integer, unable to parse string",
        ),
        ("models:\n  q: {parallel: 0}\n", "line 2: models.q.parallel = 0 should be greater than 0"),
    ],
)
def test_a_value_that_does_not_fit_says_what_was_expected(write, text, expected):
    with pytest.raises(ConfigError) as caught:
        load(write("c.yaml", text))
    assert expected in str(caught.value)


def test_all_mistakes_are_told_at_once(write):
    with pytest.raises(ConfigError) as caught:
        load(write("c.yaml", "server: {prot: 1}\nlog:\n  level: loud\n"))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("c.yaml", "server: {port: 1\n", "line 2, column 1"),
        ("c.json", '{"server": {,}}', "line 1, column 13"),
        ("c.toml", "server = \n", "line 1, column 10"),
        ("c.yaml", "- 1\n", "should be a table of settings, not list"),
        ("c.ini", "", "ends in .yaml, .yml, .toml or .json"),
    ],
)
def test_a_file_that_cannot_be_understood_says_where(write, name, text, expected):
    with pytest.raises(ConfigError) as caught:
        load(write(name, text))
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_a_key_given_twice_is_refused(write, name):
    with pytest.raises(ConfigError, match=r"line 3: server.port is given twice, first in line 2"):
        load(write(name, '{"server": {\n"port": 1,\n"port": 2}}'))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such configuration file"):
        load(tmp_path / "nowhere.yaml")


def test_an_empty_file_is_the_defaults(write):
    assert load(write("c.yaml", "# nothing yet\n")) == Config()


def test_flags_win_over_the_environment_and_that_over_the_file(write):
    file = write("c.yaml", "server: {port: 1, host: 127.0.0.2}\nlog: {level: error}\n")
    config = load(
        file, {"server.port": 3, "log.level": None}, LLAMA_GPU_SERVER_PORT="2", LLAMA_GPU_LOG_LEVEL="debug"
    )
    assert (config.server.port, config.server.host, config.log.level) == (3, "127.0.0.2", "debug")


def test_a_wrong_variable_is_named():
    with pytest.raises(ConfigError, match=r"^LLAMA_GPU_GPU_ENABLED: gpu.enabled = 'perhaps' should be"):
        load(LLAMA_GPU_GPU_ENABLED="perhaps")


def test_variables_with_lists_are_split():
    config = load(
        LLAMA_GPU_MODELS_DIRS="/a:/b", LLAMA_GPU_SERVER_API_KEYS="x,y", LLAMA_GPU_GPU_ALLOWED="GPU-1,0"
    )
    assert config.models_dirs == (Path("/a"), Path("/b"))
    assert config.server.api_keys == ("x", "y")
    assert config.gpu.allowed == ("GPU-1", 0)


def test_every_section_but_the_models_has_variables():
    assert {key[0] for key in environment_names().values()} == set(Config.model_fields) - {
        "defaults",
        "models",
    }


def test_paths_in_a_file_are_relative_to_it(write, tmp_path):
    config = load(
        write(
            "c.yaml",
            "models_dirs: [a, /b]\nengine: {path: bin/llama-server}\n"
            "defaults: {mmproj: none}\nmodels: {x: {draft: d.gguf}}\n",
        )
    )
    assert config.models_dirs == (tmp_path / "a", Path("/b"))
    assert config.engine.path == tmp_path / "bin/llama-server"
    assert config.options_for("x").draft == tmp_path / "d.gguf"
    assert config.options_for("x").mmproj == "none"


def test_a_bare_engine_name_is_left_for_the_path_variable(write):
    assert load(write("c.yaml", "engine: {path: llama-server}")).engine.path == Path("llama-server")


def test_the_exact_id_wins_over_patterns_and_patterns_over_defaults(write):
    config = load(
        write(
            "c.yaml",
            "defaults: {parallel: 1, priority: 1, batch: 64}\n"
            "models:\n  qwen-8b: {parallel: 3}\n  qwen*: {parallel: 2, priority: 2}\n",
        )
    )
    options = config.options_for("Qwen-8B")
    assert (options.parallel, options.priority, options.batch, options.micro_batch) == (3, 2, 64, 512)
    assert config.options_for("llama").parallel == 1


def test_a_models_own_options_win_over_other_sections(write):
    config = load(
        write(
            "c.yaml",
            "gpu: {cpu_fallback: true}\nserver_pool: {gpu_layers: 0}\n"
            "models: {x: {cpu: never, gpu_layers: all, start_timeout_seconds: 5}}\n",
        )
    )
    own, other = config.options_for("x"), config.options_for("y")
    assert (own.cpu, own.gpu_layers, own.start_timeout_seconds) == ("never", None, 5)
    assert (other.cpu, other.gpu_layers, other.start_timeout_seconds) == ("allow", 0, 600)


@pytest.mark.parametrize(("word", "meaning"), [("on", "on"), ("off", "off"), ("yes", "on"), ("auto", "auto")])
def test_the_booleans_of_yaml_do_not_spoil_flash_attention(write, word, meaning):
    assert load(write("c.yaml", f"defaults: {{flash_attention: {word}}}")).defaults.flash_attention == meaning


def test_sizes_may_carry_a_unit(write):
    assert load(write("c.yaml", "gpu: {headroom_bytes: 512MiB}")).gpu.headroom_bytes == 512 * 1024**2


def test_an_open_endpoint_with_a_key_is_no_cause_for_warning(write):
    assert load(write("c.yaml", "server: {host: 0.0.0.0, api_keys: secret}")).warnings == ()


def test_keys_are_not_shown(write):
    assert "secret" not in repr(load(write("c.yaml", "server: {api_keys: [secret]}")))


def test_a_server_address_beyond_loopback_is_not_taken(write):
    config = load(write("c.yaml", "server_pool: {host: 0.0.0.0}"))
    assert config.server_pool.bind_host == "127.0.0.1"
    assert "server_pool.host" in config.warnings[0]


@pytest.mark.parametrize(
    ("fallback", "policy", "serves"),
    [("true", "allow", True), ("false", "never", False), ("null", "never", True)],
)
def test_cpu_fallback_has_three_meanings(write, fallback, policy, serves):
    gpu = load(write("c.yaml", f"gpu: {{cpu_fallback: {fallback}}}")).gpu
    assert (gpu.cpu_policy, gpu.serves_without_gpu) == (policy, serves)


def test_every_setting_is_described():
    schema = Config.model_json_schema(by_alias=False)
    undescribed = [
        f"{section}.{key}"
        for section, model in [("Config", schema), *schema["$defs"].items()]
        for key, field in model["properties"].items()
        if not field.get("description") and "$ref" not in field
    ]
    assert undescribed == []
