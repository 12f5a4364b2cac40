"""lm-evaluation-harness (the extra `eval`) drives our models, in process: the `LM` it asks for.

model = load_model(DIR)
lm = Harness(model, load_tokenizer("model", DIR), rows=8)
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
from sat_jax.evaluate.complete import complete
from sat_jax.evaluate.generate import GREEDY, Sampling
from sat_jax.evaluate.likelihood import Pair, encode_pairs, first_token, likelihoods
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
        " 'sat_jax[eval]', or -e '.[eval]' in a copy of the project"
    ) from error

MAX_NEW_TOKENS = 256  # where a task does not say, as in the harness's own models


class Harness(LM):
    """A model and its tokenizer as the harness wants them, `rows` rows at once; `system` is the
    system prompt of chats that have none.

    Numbers are those of the harness's `hf` model up to rounding: texts are encoded and split as
    there, and what is longer than the model's positions loses its beginning. One difference: where
    a tokenizer begins every text with its bos, a rolling log-likelihood has it once, not twice.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, rows: int = 8, system: str | None = None
    ):
        super().__init__()
        self._model, self._tokenizer, self._rows = model, tokenizer, rows
        self._system = system
        self._ends: list[Stop] = []  # of answers, once a chat has been asked for

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log p, whether greedy) of each request's (context, continuation)."""
        pairs = encode_pairs(self._tokenizer, [request.args for request in requests])
        found = self._likelihoods(pairs)
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, one)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p of each request's whole text, in windows that do not overlap but for the last."""
        first = first_token(self._tokenizer)
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (ids,) = self._tokenizer.encode_batch(request.args)
            if self._tokenizer.adds_bos:
                ids = ids[1:]
            length = self._model.config.max_positions
            for window in get_rolling_token_windows(ids, first, length, 1):
                pairs.append(Pair(*make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (log_p, _) in zip(owners, self._likelihoods(pairs), strict=True):
            totals[number] += log_p
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What follows each request's context, up to the texts and lengths that its task names."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            contexts = [requests[number].args[0] for number in numbers]
            made = self._generate(contexts, requests[numbers[0]].args[1])
            for number, text in zip(numbers, made, strict=True):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    @property
    def tokenizer_name(self) -> str:
        """What tells the tokenizer and its chat template from others: the harness's caches ask."""
        return f"{Path(self._tokenizer.name).name}-{self._tokenizer.fingerprint[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template; it has one, and none goes by a name."""
        if isinstance(chat_template, str):
            raise UserError(
                f"chat template {chat_template!r}: accepted is the model's own, no name"
            )
        return self._tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation, which ends where the model's turn begins."""
        if not add_generation_prompt:
            raise UserError("a task that begins the model's turn itself cannot be asked as a chat")
        self._ends = end_of_turn(self._tokenizer)
        return chat_prompt(self._tokenizer, chat_history, self._system)

    def _likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        most = self._model.config.max_positions
        pairs = [_fitted(pair, most) for pair in pairs]
        total = sum(pair.length for pair in pairs)
        with tqdm(total=total, unit=" tokens", unit_scale=True, leave=False) as bar:
            found = likelihoods(self._model, pairs, self._rows, bar.update)
        return [(one.log_p, one.greedy) for one in found]

    def _generate(self, contexts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        settings = dict(normalize_gen_kwargs(asked, MAX_NEW_TOKENS))
        stops = [stop for stop in settings.pop("until") if stop]
        most = settings.pop("max_gen_toks")
        sampling = _sampling(settings)
        room = self._model.config.max_positions - most
        if room < 1:
            raise UserError(
                f"{most} new tokens, which the task asks for, leave no room for a prompt in the"
                f" model's {self._model.config.max_positions} positions"
            )
        prompts = [ids[-room:] for ids in self._tokenizer.encode_batch(contexts)]
        with tqdm(total=len(prompts) * most, unit=" tokens", leave=False) as bar:
            made = complete(
                self._model,
                self._tokenizer,
                prompts,
                most,
                self._rows,
                stops=[*stops, *self._ends],
                sampling=sampling,
                done=bar.update,
            )
        return [one.text for one in made]


def _fitted(pair: Pair, most: int) -> Pair:
    """The pair without as much of its beginning as the model has no positions for."""
    surplus = pair.length - most
    if surplus >= len(pair.context):
        raise UserError(
            f"a continuation of {len(pair.continuation)} tokens; the model has {most} positions"
        )
    return Pair(pair.context[max(surplus, 0) :], pair.continuation)


def _sampling(settings: dict[str, Any]) -> Sampling:
    """How a task wants tokens chosen. Raises `UserError` for a setting that is not known here."""
    drawn = settings.pop("do_sample")
    temperature = settings.pop("temperature", 0.0)
    top_k, top_p = settings.pop("top_k", None), settings.pop("top_p", 1.0)
    if settings:
        raise UserError(
            f"a task asks to generate with {', '.join(settings)}; accepted: until, max_gen_toks,"
            " do_sample, temperature, top_k, top_p"
        )
    return Sampling(temperature or 1.0, top_k, top_p) if drawn else GREEDY


def find_tasks(tasks: Sequence[str], include_path: Path | None = None) -> TaskManager:
    """Who knows `tasks`: the harness's own, or those of YAML files in `include_path`.

    Raises `UserError` for a task that is not known, and for one that cannot be loaded: its YAML is
    wrong, or its data cannot be had. What is loaded here is loaded again to be run, from a cache.
    """
    if include_path is not None:
        if not include_path.is_dir():
            raise UserError(f"{include_path}: there is no such folder")
        # To index the harness's thousands of files takes seconds; a group may still need them.
        alone = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(alone.all_tasks) - set(alone.all_groups):
            _load(alone, tasks)
            return alone
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        where = "" if include_path is None else f" or in {include_path}"
        raise UserError(f"no task {', '.join(unknown)} in lm-evaluation-harness{where}")
    _load(manager, tasks)
    return manager


def _load(manager: TaskManager, tasks: Sequence[str]) -> None:
    load = getattr(manager, "load", None) or manager.load_task_or_group  # older ones
    for task in tasks:
        try:
            load([task])
        except Exception as error:  # the harness's, those of datasets and of a task's own code
            cause = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
            raise UserError(f"task {task}: cannot be loaded: {cause}") from error


def run_tasks(
    lm: Harness,
    manager: TaskManager,
    tasks: Sequence[str],
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
) -> list[dict[str, Any]]:
    """The harness's figures: `task`, `metric` (with its filter), `value`, `stderr`.

    `shots` None: as many as each task says; `limit`: the first documents of each.
    """
    result = evaluator.simple_evaluate(
        lm,
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        apply_chat_template=chat,
        task_manager=manager,
        log_samples=False,
    )
    figures = []
    for task, values in result["results"].items():
        for name, value in values.items():
            metric, comma, kind = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            known = isinstance(error, float)
            figures.append(
                {
                    "task": task,
                    "metric": metric if kind == "none" else f"{metric} ({kind})",
                    "value": value,
                    "stderr": error if known else None,
                }
            )
    return figures
