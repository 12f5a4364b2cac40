"""Adapter for lm-evaluation-harness (the extra `eval`): a model as its `LM`, in process.

model = load_model(DIR)
lm = HarnessModel(model, load_tokenizer("model", DIR), rows=8)
lm_eval.simple_evaluate(lm, tasks=["arc_easy"])
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sat_jax.data.end_of_turn import Stop, end_of_turn
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.completions import complete
from sat_jax.evaluate.generate import GREEDY, Sampling
from sat_jax.evaluate.likelihood import Likelihood, Pair, encode_pairs, first_token, likelihoods
from sat_jax.evaluate.prompts import chat_prompt
from sat_jax.nn.decoder import Decoder

try:
    from lm_eval import evaluator
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(
        f"lm-evaluation-harness cannot be imported ({error}); install the extra: pip install"
        " 'sat_jax[eval]', or pip install -e '.[eval]' in a clone of the project"
    ) from error

MAX_NEW_TOKENS = 256  # default of a task, as in the models of the harness


class HarnessModel(LM):
    """A model with its tokenizer, evaluated in batches of `rows` rows.

    `system` is the system prompt of chats that have none. Results are those of the `hf` model of
    the harness up to rounding: texts are encoded and divided in the same way, and texts that exceed
    the model's positions are truncated on the left. Two differences, if the tokenizer adds a bos: a
    rolling log-likelihood has one bos, not two; a chat begins with a bos only if the chat template
    writes it, as in training.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, rows: int = 8, system: str | None = None
    ):
        super().__init__()
        self._model, self._tokenizer, self._rows = model, tokenizer, rows
        self._system = system
        self._turn_ends: list[Stop] = []
        self._encode = tokenizer.encode_batch

    def loglikelihood(self, requests: Sequence[Any]) -> list[Likelihood]:
        """Return (log p, is greedy) for the (context, continuation) of each request."""
        texts = [request.args for request in requests]
        pairs = encode_pairs(self._tokenizer, texts, self._encode)
        return self._likelihoods(pairs)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return log p of the text of each request, in windows; only the last one may overlap."""
        first = first_token(self._tokenizer)
        pairs: list[Pair] = []
        ends = []  # number of pairs up to each request
        for request in requests:
            (ids,) = self._tokenizer.encode_batch(request.args)
            ids = ids[len(self._tokenizer.prefix) :]
            length = self._model.config.max_positions
            for window in get_rolling_token_windows(ids, first, length, 1):
                pairs.append(Pair(*make_disjoint_window(window)))
            ends.append(len(pairs))
        log_p = [result.log_p for result in self._likelihoods(pairs)]
        return [sum(log_p[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the completion of each context, with the stop texts and limits of its task."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        for indices in groups.values():
            contexts = [requests[index].args[0] for index in indices]
            completions = self._generate(contexts, requests[indices[0]].args[1])
            for index, text in zip(indices, completions, strict=True):
                texts[index] = text
        return texts

    @property
    def tokenizer_name(self) -> str:
        """The key of the tokenizer and its chat template in the caches of the harness."""
        return f"{Path(self._tokenizer.name).name}-{self._tokenizer.fingerprint[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the model's only template; templates with names are not supported."""
        if isinstance(chat_template, str):
            raise UserError(
                f"chat template {chat_template!r}: accepted: only the model's template, no name"
            )
        return self._tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt of a conversation, which ends at the start of the model's turn."""
        if not add_generation_prompt:
            raise UserError(
                "a task that begins the model's turn itself cannot be evaluated as a chat"
            )
        # The requests that follow have texts that this method has returned.
        self._turn_ends = end_of_turn(self._tokenizer)
        self._encode = self._tokenizer.encode_rendered
        return chat_prompt(self._tokenizer, chat_history, self._system)

    def _likelihoods(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        limit = self._model.config.max_positions
        pairs = [_truncated(pair, limit) for pair in pairs]
        total = sum(pair.length for pair in pairs)
        with tqdm(total=total, unit=" tokens", unit_scale=True, leave=False) as bar:
            return likelihoods(self._model, pairs, self._rows, bar.update)

    def _generate(self, contexts: Sequence[str], gen_kwargs: dict[str, Any]) -> list[str]:
        settings = dict(normalize_gen_kwargs(gen_kwargs, MAX_NEW_TOKENS))
        stops = [stop for stop in settings.pop("until") if stop]
        max_new_tokens = settings.pop("max_gen_toks")
        sampling = _sampling(settings)
        max_prompt = self._model.config.max_positions - max_new_tokens
        if max_prompt < 1:
            raise UserError(
                f"the task generates {max_new_tokens} tokens, which leaves no positions for a"
                f" prompt; the model has {self._model.config.max_positions} positions"
            )
        prompts = [ids[-max_prompt:] for ids in self._encode(contexts)]
        with tqdm(total=len(prompts) * max_new_tokens, unit=" tokens", leave=False) as bar:
            completions = complete(
                self._model,
                self._tokenizer,
                prompts,
                max_new_tokens,
                self._rows,
                stops=[*stops, *self._turn_ends],
                sampling=sampling,
                on_batch=bar.update,
            )
        return [completion.text for completion in completions]


def _truncated(pair: Pair, limit: int) -> Pair:
    """Return the pair with its context truncated on the left to `limit` input tokens."""
    surplus = pair.length - limit
    if surplus >= len(pair.context):
        raise UserError(
            f"a continuation of {len(pair.continuation)} tokens; the model has {limit} positions"
        )
    return Pair(pair.context[max(surplus, 0) :], pair.continuation)


def _sampling(settings: dict[str, Any]) -> Sampling:
    """Return the sampling of a task. Raises `UserError` for a setting that is not supported."""
    do_sample = settings.pop("do_sample")
    temperature = settings.pop("temperature", 0.0)
    top_k, top_p = settings.pop("top_k", None), settings.pop("top_p", 1.0)
    if settings:
        raise UserError(
            f"a task generates with {', '.join(settings)}; accepted: until, max_gen_toks,"
            " do_sample, temperature, top_k, top_p"
        )
    return Sampling(temperature or 1.0, top_k, top_p) if do_sample else GREEDY


def find_tasks(tasks: Sequence[str], include_path: Path | None = None) -> TaskManager:
    """Return a manager that knows `tasks`, of the harness or of YAML files in `include_path`.

    Raises `UserError` for an unknown task, and for one that cannot be loaded because of its YAML or
    its data. Running a task loads it again, from a cache.
    """
    if include_path is not None:
        if not include_path.is_dir():
            raise UserError(f"{include_path}: no such folder")
        # Indexing the thousands of files of the harness takes seconds. Only groups may need them.
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(manager.all_tasks) - set(manager.all_groups):
            _load(manager, tasks)
            return manager
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        location = "" if include_path is None else f" or in {include_path}"
        raise UserError(f"no task {', '.join(unknown)} in lm-evaluation-harness{location}")
    _load(manager, tasks)
    return manager


def _load(manager: TaskManager, tasks: Sequence[str]) -> None:
    load = getattr(manager, "load", None) or manager.load_task_or_group  # older versions
    for task in tasks:
        try:
            load([task])
        except Exception as error:  # of the harness, of datasets, or of the code of a task
            cause = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
            raise UserError(f"task {task}: cannot be loaded: {cause}") from error


def run_tasks(
    lm: HarnessModel,
    manager: TaskManager,
    tasks: Sequence[str],
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
) -> list[dict[str, Any]]:
    """Return the results of the harness: `task`, `metric` (with its filter), `value`, `stderr`.

    `shots` None: the default of each task. `limit`: only the first documents of each task.
    """
    output = evaluator.simple_evaluate(
        lm,
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        apply_chat_template=chat,
        task_manager=manager,
        log_samples=False,
    )
    figures = []
    for task, values in output["results"].items():
        for name, value in values.items():
            metric, comma, filter_name = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            figures.append(
                {
                    "task": task,
                    "metric": metric if filter_name == "none" else f"{metric} ({filter_name})",
                    "value": value,
                    "stderr": error if isinstance(error, float) else None,
                }
            )
    return figures
