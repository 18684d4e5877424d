"""The other side: `ray.serve.llm` of the same Ray, with the same model folder and engine arguments.

It needs packages that Relight does not; they go into an environment of their own, `.relight/bench-venv`, which takes
everything else from `.venv`, so that Ray, vLLM and torch are the same files. Ray 2.60 pins vLLM 0.29; its Serve side
runs with 0.32 as it is: what it misses there is a helper of its KV-aware router, which is not used here.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from typing import Any

from bench.clusters import HERE, BenchError, Running, say, spec, wait_for

PACKAGES = ("pyarrow==26.0.1", "jsonref==1.1.0")
APP = "bench.baseline:build"
_VENV = HERE.state_dir / "bench-venv"


def python() -> str:
    """The interpreter of the environment, which is made if it is not there."""
    interpreter = _VENV / "bin" / "python"
    stamp = _VENV / "relight-stamp"
    wanted = "\n".join([sys.version, *PACKAGES, str(HERE.root)])
    if not stamp.is_file() or stamp.read_text() != wanted:
        say(f"making {_VENV} for ray.serve.llm ({', '.join(PACKAGES)})")
        venv.create(_VENV, with_pip=True, clear=True)
        site = next((_VENV / "lib").glob("python*")) / "site-packages"
        main = next((HERE.root / ".venv" / "lib").glob("python*")) / "site-packages"
        # Python does not follow .pth files of folders that came from one, such as that of an editable install.
        (site / "relight.pth").write_text(f"{main}\n{HERE.root}\n")
        command = [str(interpreter), "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES]
        if subprocess.run(
            command, stdout=sys.stderr.fileno(), stdin=subprocess.DEVNULL, check=False
        ).returncode:
            raise BenchError("ray.serve.llm's packages can't be installed; --no-baseline goes on without it")
        stamp.write_text(wanted)
    return str(interpreter)


def settings(model_path: str, *, min_replicas: int, tuned: bool) -> dict[str, Any]:
    """What `build` takes. `tuned`: with the autoscaling metrics' periods that Relight sets, too."""
    autoscaling: dict[str, Any] = {
        "min_replicas": min_replicas,
        "max_replicas": 1,
        "upscale_delay_s": 0,
        "downscale_delay_s": 1,
        "target_ongoing_requests": 16,
    }
    if tuned:
        autoscaling |= {"metrics_interval_s": 0.2, "look_back_period_s": 1.0}
    return {
        "model": spec().model,
        "path": model_path,
        "autoscaling": autoscaling,
        "engine": engine_arguments(),
        "env": dict(spec().env),
    }


def engine_arguments() -> dict[str, Any]:
    """The fleet's engine arguments, as keywords."""
    from bench.clusters import fleet

    return dict(fleet()["models"][0]["engine"])


def build(args: dict[str, Any]) -> Any:
    """`serve run bench.baseline:build fleet=SETTINGS`, in the bench's environment."""
    import json
    from pathlib import Path

    from ray.serve.llm import LLMConfig, build_openai_app

    wanted = json.loads(Path(args["fleet"]).read_text())
    config = LLMConfig(
        model_loading_config={"model_id": wanted["model"], "model_source": wanted["path"]},
        deployment_config={
            "autoscaling_config": wanted["autoscaling"],
            "ray_actor_options": {"num_cpus": 1},
            "max_ongoing_requests": 256,
        },
        accelerator_type=None,
        engine_kwargs=wanted["engine"],
        placement_group_config={"bundles": [{"CPU": 1}]},
        runtime_env={"env_vars": {**wanted["env"], "HF_HUB_OFFLINE": "1"}},
    )
    return build_openai_app({"llm_configs": [config]})


def wait_until_dark(running: Running, settle_s: float = 2.0) -> None:
    """No replica of the model and no engine process. Ray's names of processes say so; there is no page that does."""
    import time

    def dark() -> bool:
        return not any(
            "LLMServer" in p.command or "EngineCore" in p.command or "VLLM" in p.command
            for p in running.processes()
        )

    wait_for("ray.serve.llm does not go to zero", dark, 180, 0.5)
    time.sleep(settle_s)
