"""One of two processes of a training run: `torchrun distributed_process.py CASE RECIPE DATA LLM OUT`."""

import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from persona.training.data import Collator, Examples
from persona.training.processes import average_gradients, of_first, process_number
from persona.training.recipe import Domain, load_recipe
from persona.training.trainer import WithObjectives, new_model, train_adapter

CHANGES = [
    "encoder.width=32",
    "encoder.heads=2",
    "encoder.layers=2",
    "encoder.tokens=4",
    "encoder.dropout=0",
    "training.histories_per_step=4",
    "training.questions_per_history=3",
    "training.contrastive_weight=1.0",
    "training.contrastive_dims=[16]",
]


def stop(domain, llm, out):
    """Dies after five of eight steps, as a crash would have it."""
    made = []

    def count(*_):
        made.append(None)
        if len(made) > 5:
            raise InterruptedError

    register_optimizer_step_post_hook(count)
    train_adapter(domain, llm, out, steps=8)


def shard(domain, llm, out):
    """Trains with the frozen LLM sharded as fsdp.yaml says, which `accelerate launch` put into the environment.

    What accelerate's Accelerator would do, which takes FSDP on accelerators alone, is done here.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    dist.init_process_group("gloo")
    torch.manual_seed(domain.recipe.training.seed)
    model = WithObjectives(new_model(domain, llm), domain.recipe.training).train()
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_auto_wrap_policy(model)
    fsdp2_prepare_model(
        SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", device="cpu", is_main_process=True
        ),
        model,
    )
    sharded = {name for name, p in model.named_parameters() if isinstance(p.data, DTensor)}
    assert sharded == {name for name, _ in model.named_parameters() if name.startswith("model.llm.")}
    losses = steps_of(model, domain, average=True)
    if process_number() == 0:
        model.save_pretrained(out)
        torch.save(losses, out + "/losses.pt")
    dist.destroy_process_group()


def steps_of(model, domain, *, average=False, steps=4):
    """Losses of so many steps of AdamW, each process with its share of the batch."""
    size, own = domain.recipe.training.histories_per_step, [p for p in model.parameters() if p.requires_grad]
    examples, collate = Examples(domain, steps * size), Collator(model.model, domain.recipe.training)
    optimizer, losses = torch.optim.AdamW(own, lr=1e-3), []
    share = size // (dist.get_world_size() if average else 1)
    for step in range(steps):
        first = step * size + process_number() * share
        loss = model(**collate([examples[i] for i in range(first, first + share)]))["loss"]
        loss.backward()
        losses.append(float(loss.detach()))
        if average:
            average_gradients(own)
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if not average:
        return torch.tensor(losses)
    total = torch.tensor(losses)
    dist.all_reduce(total)
    assert of_first(process_number(), total.device) == 0
    return total / dist.get_world_size()


if __name__ == "__main__":
    torch.set_num_threads(1)
    case, recipe, data, llm, out = sys.argv[1:]
    {"stop": stop, "shard": shard}[case](Domain(load_recipe(recipe, CHANGES), data), llm, out)
