"""A sequence that does not fit one unit's memory limit runs on two that cut it.

python examples/long_context.py [TOKENS]
"""

from __future__ import annotations

import sys
import tempfile

import torch
import transformers

import fanfold as ff
from fanfold.errors import UnitLost

LIMIT = "440MB"  # a unit may hold, weights included


def main() -> None:
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 8192
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=8,
        vocab_size=256,
        max_position_embeddings=tokens,
    )
    ids = torch.randint(0, 256, (1, tokens))
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        print(f"{tokens} tokens, {LIMIT} a unit")
        for layout in ("tensor=1", "context=2:ring"):
            with ff.parallel(folder, layout=layout, memory_per_unit=LIMIT) as model:
                units = f"{model.split.units} unit" + "s" * (model.split.units > 1)
                try:
                    found = model(input_ids=ids).logits
                except UnitLost as error:
                    cause = "can't allocate memory" if "allocate" in str(error) else str(error)
                    print(f"{layout}, {units}: does not fit ({cause})")
                else:
                    print(f"{layout}, {units}: logits {tuple(found.shape)}")
        with torch.no_grad():
            whole = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits
        print(f"at most {float((found - whole).abs().max() / whole.abs().max()):.1e} from the whole model, unlimited")


if __name__ == "__main__":
    main()
