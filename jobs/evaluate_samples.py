"""`corral evaluate samples`: a sampling report."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import ConfigError, DataError
from jobs.command import Tool, output_path, tool_recipe

if TYPE_CHECKING:
    from app.config.recipe import Recipe
    from app.data.templates import Template
    from app.evaluation.sampling import Request
    from app.evaluation.sampling_config import SamplingConfig
    from app.formats.records import PromptItem

KEYS = (
    "data",
    "model.precision",
    "model.trust_remote_code",
    "rollout.engines",
    "rollout.kv_cache_gib",
    "rollout.gpu_memory_utilization",
    "run.deadline_seconds",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, prompts, sampling, and where the report goes."""
    parser.add_argument("--model", required=True, metavar="FOLDER", help="model folder, such as runs/demo/sft/model, or hub name")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="what data.path takes; a JSON string a line is enough")
    parser.add_argument("--config", metavar="FILE", help="sampling configurations (default: k50, nucleus9, magic_numbers, greedy)")
    parser.add_argument("-n", type=int, metavar="N", help="use the first N prompts (default: all)")
    parser.add_argument("--num-samples", type=int, default=2, metavar="N", help="answers per prompt and configuration (default 2)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="longest answer where a configuration names none (default 256)"
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the sampling (default 42)")
    parser.add_argument("--report", metavar="FILE", help="where the report goes (default: DATE_MODEL_sampling_CONFIG.json)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Check everything, start an engine, sample, write the report."""
    recipe = tool_recipe("evaluate samples", KEYS, overrides, {"data.path": arguments.prompts, "model.path": arguments.model})
    for name in ("n", "num_samples", "max_new_tokens"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(arguments, name)}: give at least 1")
    from app.evaluation.sampling_config import read_configurations

    config = Path(arguments.config) if arguments.config else None
    configurations = read_configurations(config, max_new_tokens=arguments.max_new_tokens)
    date = datetime.now(UTC).isoformat()
    file = output_path(arguments.report or default_name(date, arguments.model, config))

    from app.data.templates import build_template
    from app.models.load import check_language_model, load_tokenizer

    check_language_model(arguments.model)
    prompts = read_prompts(recipe, arguments.n)
    template = build_template(recipe.data.template, load_tokenizer(arguments.model, recipe.model.trust_remote_code))

    from app.durable import write_json
    from app.evaluation.sampling import requests, results
    from app.evaluation.sampling_report import SamplingReport

    wanted = requests(
        prompts,
        configurations,
        template,
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        data=recipe.data,
    )
    texts = sample(recipe, wanted, configurations, template, file.parent)
    args: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name != "command"} | {"overrides": overrides}
    answered = results(wanted, texts, configurations)
    report = SamplingReport(model_name=arguments.model, date=date, args=args, prompts=tuple(answered))
    write_json(file, report.as_json())
    sys.stdout.write(f"{len(texts)} answers to {len(prompts)} prompts: {file}\n")
    return 0


def default_name(date: str, model: str, config: Path | None) -> str:
    """Day, model and configuration file."""
    day, name = date.partition("T")[0], re.sub(r"[^\w-]", "_", model)
    return f"{day}_{name}_sampling_{config.stem if config else 'default'}.json"


def read_prompts(recipe: Recipe, count: int | None) -> Sequence[PromptItem]:
    """The first `count` prompts of data.path, in its order. Raises DataError when there is none."""
    from app.data.corpus import load_corpus

    with tempfile.TemporaryDirectory() as folder:
        corpus = load_corpus(recipe.data, seed=recipe.run.seed, folder=Path(folder), split=False)
    if not corpus.train.prompts:
        raise DataError(f"{corpus.path} ({corpus.format} format): no prompt in it; check --prompts, data.format and data.lang")
    return corpus.train.prompts[:count]


def sample(
    recipe: Recipe, wanted: Sequence[Request], configurations: Sequence[SamplingConfig], template: Template, folder: Path
) -> list[str]:
    """Answers by vLLM engines on Ray, which end with the call. Raises ConfigError or PlacementError before Ray starts."""
    from app.config.loading import with_values
    from app.evaluation.progress import progress
    from app.evaluation.sampling import answer
    from app.models.context import context_of, require_context
    from app.models.load import seen_from_anywhere
    from app.planning.placement import check_feasible
    from app.workers.rollout_pool import rollout_pool
    from jobs import local_ray

    longest_prompt = max(len(request.ids) for request in wanted)
    longest_answer = max(config.generate_args.max_new_tokens for config in configurations)
    require_context(context_of(recipe.model.path), longest_prompt + longest_answer, "longest prompt + max_new_tokens")
    recipe = with_values(recipe, {"rollout.max_new_tokens": longest_answer})
    check_feasible(recipe, "samples", local_ray.cluster_resources(), local_ray.cluster_nodes())
    with (
        _ray(folder),
        rollout_pool(
            seen_from_anywhere(recipe.model.path),
            recipe.rollout,
            precision=recipe.model.precision,
            max_prompt_length=longest_prompt,
            eos_ids=[template.eos_id],
            seed=recipe.run.seed,
            deadline_seconds=recipe.run.deadline_seconds,
        ) as pool,
    ):
        with progress("engine", 1) as advance:
            pool.ready()
            advance(1)
        with progress("answers", len(wanted)) as advance:
            return answer(pool, wanted, template, advance)


@contextmanager
def _ray(folder: Path) -> Iterator[None]:
    """Ray for the length of a block. Where the block fails, the trace and the workers' logs stay in `folder`/logs."""
    from app.workers.pending import TRACE
    from jobs import local_ray

    with tempfile.TemporaryDirectory() as logs:
        try:
            with local_ray.running_ray(Path(logs)):
                yield
        except Exception:
            trace = folder / TRACE
            shutil.copytree(logs, trace.parent, dirs_exist_ok=True)
            trace.write_text(traceback.format_exc())
            raise


TOOL = Tool(
    purpose="let a model answer prompts under several sampling configurations",
    details=(
        "Writes a sampling report: for every prompt the answers under each configuration, as vLLM samples them on a Ray of its own\n"
        "or on RAY_ADDRESS. The keys are those of Open-Assistant's reports, and --config takes its configuration files as far as vLLM\n"
        "can follow them (docs/evaluation.md). Greedy configurations are sampled once.\n\n"
        "example:\n  corral evaluate samples --model runs/demo/sft/model --prompts prompts.jsonl --report sft.json"
    ),
    add_arguments=add_arguments,
    run=run,
    keys=KEYS,
)
