"""check_wheel.py WHEEL: installs the wheel where there is no Rust, alone and with its extras, and uses it.

Alone it must import and read a header with nothing but the standard library; with
``[serve,engine]`` it must serve a model.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path

from make_demo_model import write_demo_model

READ_HEADER = "import sys, llama_gpu; print(llama_gpu.read_header(sys.argv[1]).architecture)"
START_SECONDS = 120


def main() -> None:
    """Checks the wheel, and says each step that held."""
    wheel = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        models = here / "models"
        model = write_demo_model(models)
        venv.create(here / "venv", with_pip=True)
        bin_folder = here / "venv" / "bin"
        # No cargo on the path, and nothing of the checkout.
        environment = {"PATH": f"{bin_folder}:/usr/bin:/bin", "HOME": os.environ["HOME"]}
        environment["XDG_CACHE_HOME"] = str(here / "cache")
        environment |= {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_"))}

        def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [bin_folder / command[0], *command[1:]],
                cwd=here,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )

        def must(*command: str | Path) -> str:
            done = run(*command)
            if done.returncode:
                sys.exit(f"failed: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
            return done.stdout

        # --no-index: a dependency of the bare wheel would have nowhere to come from.
        must("python", "-m", "pip", "install", "--quiet", "--no-index", wheel)
        architecture = must("python", "-c", READ_HEADER, model).strip()
        print(f"ok: {wheel.name} alone imports and reads a header ({architecture})")
        advice = run("llama-gpu", "gpus").stderr
        if "pip install 'llama-gpu[serve]'" not in advice:
            sys.exit(f"failed: the script without the extra does not say how to get it, but {advice!r}")
        print("ok: its script says how to get the rest")

        must("python", "-m", "pip", "install", "--quiet", f"{wheel}[serve,engine]")
        with subprocess.Popen(
            [bin_folder / "llama-gpu", "serve", models, "--port", "0"],
            cwd=here,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as proxy:
            try:
                print(f"ok: with [serve,engine] it serves: {answer_of(proxy, model.stem)!r}")
            finally:
                proxy.send_signal(signal.SIGTERM)
            _, log = proxy.communicate(timeout=START_SECONDS)
            if proxy.returncode:
                sys.exit(f"failed: exit code {proxy.returncode} after TERM\n{log}")
        print("ok: and ends with 0 when told to")


def answer_of(proxy: subprocess.Popen[str], model: str) -> str:
    """What the model says, asked through the address that the proxy printed."""
    for line in proxy.stdout or ():
        if found := re.search(r"https?://[\w.:\[\]]+", line):
            address = found[0]
            break
    else:
        sys.exit(f"failed: the proxy ended without an address\n{proxy.stderr.read() if proxy.stderr else ''}")
    body = {"model": model, "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 12}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=START_SECONDS) as response:
        content: str = json.load(response)["choices"][0]["message"]["content"]
    return content


if __name__ == "__main__":
    main()
