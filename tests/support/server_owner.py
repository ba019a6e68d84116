"""A process that owns one server, to be killed: ``server_owner.py ENGINE MODEL [EXTRA_ARGUMENT …]``.

Prints the server's process id as soon as there is one, then ``ready``, then waits until the server is gone.
"""

import asyncio
import sys

import aiohttp

from llama_gpu.engine import find_engine
from llama_gpu.launch import plan_launch
from llama_gpu.server import Server


async def own(engine: str, model: str, *extra_arguments: str) -> None:
    found = find_engine(kind="embedded") if engine == "embedded" else find_engine(engine)
    plan = plan_launch(
        engine=found,
        model_path=model,
        alias="tiny",
        api_key="k",
        context_length=256,
        extra_arguments=extra_arguments,
    )
    async with aiohttp.ClientSession() as http:
        server = Server(plan, model="tiny", http=http)
        starting = asyncio.create_task(server.start())
        while server.pid is None:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)
        print(server.pid, flush=True)
        await starting
        print("ready", flush=True)
        await server.wait_exited()


if __name__ == "__main__":
    asyncio.run(own(*sys.argv[1:]))
