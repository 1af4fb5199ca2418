"""Tiny checkpoints of a family by name, and what ranks find when they compare their shares with the whole of one."""

from __future__ import annotations

from transformers import AutoConfig

from fanfold.parallel import equal


def config_named(name, cls, settings):
    """The config of `name`, a model type and perhaps more words, for the class of that name."""
    config = AutoConfig.for_model(name.split()[0], **settings)
    config.architectures = [cls]
    return config


def compared(group, folder, **values):
    """The worst that any rank of the group has found, in float64 with every gradient unless `values` say otherwise."""
    group.ask("compare", {"folder": str(folder), "dtype": "float64", "gradients": True, **values})
    return equal.worst_of(group.answers(120))


def idle_collectives(group, folder, allowed):
    """How many collectives there are, and those without which the split model is still within what is allowed."""
    count = sum(compared(group, folder)["collectives"].values())
    mutants = [compared(group, folder, skip=skip) for skip in range(count)]
    return count, [mutant["skipped"] for mutant in mutants if equal.largest_error(mutant) <= allowed]
