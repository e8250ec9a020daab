"""Makes optimizers.json: what PyTorch's optimizers make of four weights in float64, in 200 steps.

    python3 tests/data/optimizers.py > tests/data/optimizers.json

AdamW by `fused` and by `foreach`, which must agree; SGD with momentum, Nesterov's, and plain. PyTorch has no Lion: it is the
loop of the authors' reference, github.com/google/automl/blob/master/lion/lion_pytorch.py.
"""

import json

import torch

STEPS, WEIGHTS = 200, [1.0, -0.5, 0.25, 2.0]


def gradients(step):
    """Of any sign and four magnitudes, exact in every language."""
    of = lambda i: ((step * 7919 + i * 104729) % 1000 - 499.5) / 500.0 / 10.0**i
    return torch.tensor([of(i) for i in range(len(WEIGHTS))], dtype=torch.float64)


class Lion(torch.optim.Optimizer):
    def __init__(self, parameters, lr, betas, weight_decay):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1 - group["lr"] * group["weight_decay"])
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p)
                exp_avg, (beta1, beta2) = state["exp_avg"], group["betas"]
                update = exp_avg * beta1 + p.grad * (1 - beta1)
                p.add_(update.sign_(), alpha=-group["lr"])
                exp_avg.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def trained(make):
    parameter = torch.nn.Parameter(torch.tensor(WEIGHTS, dtype=torch.float64))
    optimizer = make([parameter])
    for step in range(1, STEPS + 1):
        parameter.grad = gradients(step)
        optimizer.step()
    return parameter.tolist()


adamw = [
    trained(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.01, **{kind: True})) for kind in ("fused", "foreach")
]
assert all(abs(a - b) < 1e-12 for a, b in zip(*adamw)), adamw
result = {
    "adamw": adamw[0],
    "momentum": trained(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)),
    "nesterov": trained(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True)),
    "sgd": trained(lambda p: torch.optim.SGD(p, lr=1e-2)),
    "lion": trained(lambda p: Lion(p, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)),
}
print(json.dumps({"torch": torch.__version__.split("+")[0], "weights": WEIGHTS, "steps": STEPS} | result, indent=1))
