"""A model whose layers lie on the processes of a group, answering in the process that has started it."""

from __future__ import annotations

import os
import sys
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fanfold.engine.group import Group
from fanfold.engine.supervisor import IN_WORKER, Supervisor
from fanfold.errors import PlanError, UnitLost
from fanfold.parallel.program import Beat
from fanfold.parallel.ring import MOST
from fanfold.parallel.transport import new_place, remove
from fanfold.plan.plan import Unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fanfold.parallel.mesh import Split
    from fanfold.parallel.split import HeadKind

LOAD_S = 600.0
ANSWER_S = 600.0
_IMPORTS = ("torch", "transformers", "fanfold.parallel.program", "fanfold.parallel.split", "fanfold.parallel.equal")


class ParallelModel:
    """A model whose layers lie on several processes; it answers in the caller's process. Close it, or use `with`.

    `model(input_ids=..., attention_mask=...)`: transformers' own output, whole, without keys and values.
    `model.generate(input_ids, ...)`: token ids [B, prompt + new], greedy; with do_sample=True drawn, so that a row's
    draws depend on seed, row and position alone (temperature, top_k, top_p, min_p); an encoder-decoder's ids are
    [B, 1 + new]. PlanError where the model cannot, or where an encoder-decoder lies in pipeline stages.
    `head`: the one that the config names, none, or one of a kind. `memory_bytes`: what each process may hold.
    Raises: UnitLost where a rank dies or falls silent; the group has then ended.
    """

    def __init__(
        self,
        folder: str,
        split: Split,
        *,
        dtype: str,
        timeout_s: float,
        head: HeadKind = "own",
        threads: int = 1,
        memory_bytes: int | None = None,
    ) -> None:
        self.split, self._folder = split, folder
        self._ranks = start(split, timeout_s=timeout_s, threads=threads, memory_bytes=memory_bytes)
        self._end = weakref.finalize(self, self._ranks.close)  # also where nobody closes it
        try:
            self._ranks.ask("load", {"folder": folder, "dtype": dtype, "head": head})
            self.pids = tuple(pid for _, pid in self._ranks.answers(LOAD_S))
        except BaseException:
            self.close()
            raise

    def __call__(self, **inputs: Any) -> Any:
        self._check(inputs.get("input_ids"))
        self._ranks.ask("call", inputs)
        return self._ranks.answer(ANSWER_S)

    def generate(
        self,
        input_ids: Any,
        *,
        attention_mask: Any = None,
        seed: int | None = None,
        micro_batches: int = 1,
        **options: Any,
    ) -> Any:
        self._check(input_ids)
        most = min(MOST, len(input_ids)) if self.split.pipeline > 1 else 1
        if not 1 <= micro_batches <= most:
            raise PlanError(
                f"generate(..., micro_batches={micro_batches})",
                found=f"{len(input_ids)} row(s) in layout {self.split}",
                allowed=f"1 to {most}: a micro-batch has a row at the least, {MOST} go round at most",
                do=f"use micro_batches={most}" if self.split.pipeline > 1 else "leave it away, or use pipeline=2",
            )
        if self.split.context > 1 and self.split.pipeline > 1:
            raise PlanError(
                f"generate with --layout {self.split}",
                found="stages and a cut sequence together",
                allowed="context with tensor, or pipeline with tensor",
                do="leave one of the two away",
            )
        from fanfold.parallel.families_seq2seq import check_generate
        from fanfold.parallel.split import config_of

        check_generate(config_of(self._folder), self.split)
        values = {"input_ids": input_ids, "attention_mask": attention_mask, "seed": seed, "options": options}
        values["micro_batches"] = micro_batches
        self._ranks.ask("generate", values)
        return self._ranks.answer(ANSWER_S)

    def _check(self, ids: Any) -> None:
        """PlanError before the ranks fail, and end, over it."""
        if ids is not None and ids.shape[-1] < self.split.context:
            raise PlanError(
                f"a sequence of {ids.shape[-1]} token(s) with --layout {self.split}",
                found=f"{ids.shape[-1]} token(s) for {self.split.context} units",
                allowed=f"at least {self.split.context} tokens: a unit has one at the least",
                do="pad the batch, or use a smaller context",
            )

    def apply(self, function: Callable[..., Any], *, beat: Callable[[int], None] | None = None, **values: Any) -> Any:
        """What `function(here, **values)` returns on the lead; every rank calls it, here: parallel.program.Here.

        An error of `beat`, which learns of tokens that are done, ends the group: its ranks are in the middle.
        """
        self._ranks.ask("apply", {"function": function, "values": values})
        while isinstance(found := self._ranks.answer(ANSWER_S), Beat):
            if beat is not None:
                try:
                    beat(found.tokens)
                except BaseException:
                    self.close()
                    raise
        return found

    def close(self) -> None:
        """The group ends; twice is fine."""
        self._end()

    def __enter__(self) -> ParallelModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def ends_with_its_group() -> Iterator[None]:
    """On a unit: where the group is lost, so is the unit, and its supervisor starts another."""
    try:
        yield
    except UnitLost as error:
        if not os.environ.get(IN_WORKER):
            raise
        print(error, file=sys.stderr, flush=True)
        os._exit(70)


class Running:
    """A group of ranks and the place where they meet."""

    def __init__(self, supervisor: Supervisor, group: Group, path: str, lead: int) -> None:
        self._supervisor, self._group, self._path, self._lead = supervisor, group, path, lead

    def ask(self, verb: str, values: dict[str, Any]) -> None:
        for rank in range(self._group.size):
            self._group.send(rank, (verb, values))

    def answer(self, timeout_s: float) -> Any:
        """Of the rank that has the result: the first of the last stage."""
        return self._group.receive(self._lead, timeout_s)

    def answers(self, timeout_s: float) -> list[Any]:
        return [self._group.receive(rank, timeout_s) for rank in range(self._group.size)]

    def close(self) -> None:
        self._group.close()
        self._supervisor.close()
        remove(self._path)


def start(split: Split, *, timeout_s: float, threads: int = 1, memory_bytes: int | None = None) -> Running:
    """`memory_bytes`: what each rank may hold beyond what its imports hold."""
    from fanfold.parallel.program import Ranks

    path = new_place()
    supervisor = Supervisor(imports=_IMPORTS, threads=threads)
    try:
        program = Ranks(path=path, split=split, threads=threads, timeout_s=timeout_s)
        group = Group(supervisor, Unit(name="group"), program, split.units, memory_bytes=memory_bytes)
    except BaseException:
        supervisor.close()
        remove(path)
        raise
    return Running(supervisor, group, path, (split.pipeline - 1) * split.width)
