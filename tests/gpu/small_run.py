"""Every kernel once or twice on small tensors of every dtype and alignment, for compute-sanitizer to watch.

`make gpu-check` runs it.
"""

from __future__ import annotations

import torch

from sam_fast import SAM, BatchNormSnapshot

SIZES = [1, 15, 16, 17, 1009, 4096, 4097, 20_000]


def params_of(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    found = []
    for size in SIZES:
        for shift in (0, 1):  # an odd address takes the element-by-element path
            p = torch.nn.Parameter(torch.randn(size + shift, device="cuda").to(dtype)[shift:])
            p.grad = torch.randn(size, device="cuda").to(dtype)
            found.append(p)
    return found


def main() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        params = params_of(dtype)
        before = [p.detach().clone() for p in params]
        half = len(params) // 2
        groups = [{"params": params[:half]}, {"params": params[half:], "adaptive": True, "rho": 0.5}]
        optimizer = SAM(groups, lr=0.0, backend="cuda")
        for gradient in ("finite", "nan", "none"):
            if gradient == "nan":
                params[3].grad[0] = float("nan")
            if gradient == "none":
                params[3].grad[0] = 0.0
                for p in params[::2]:
                    p.grad = None
            optimizer.first_step()
            optimizer.restore()
            assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    for number in (130, 820):  # kernel arguments of 32 KB, and more tensors than fit into them
        many = [torch.nn.Parameter(torch.randn(1 + 67 * i % 5000, device="cuda")) for i in range(number)]
        for p in many:
            p.grad = torch.randn_like(p)
        before = [p.detach().clone() for p in many]
        optimizer = SAM(many, lr=0.0, backend="cuda")
        optimizer.first_step()
        optimizer.restore()
        assert all(torch.equal(p, w) for p, w in zip(many, before, strict=True))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for base, options in (
            (torch.optim.SGD, {"momentum": 0.9}),
            (torch.optim.AdamW, {"amsgrad": True}),
            (torch.optim.AdamW, {"capturable": True}),
        ):
            optimizer = SAM(
                params_of(dtype), base, lr=0.01, weight_decay=0.1, stochastic_rounding=True, backend="cuda", **options
            )
            for _ in range(3):  # the first step also makes the state
                optimizer.first_step()
                optimizer.second_step()
    model = torch.nn.Sequential(*(torch.nn.BatchNorm1d(n) for n in (1, 17, 300))).cuda()
    snapshot = BatchNormSnapshot(model)
    snapshot.save()
    snapshot.restore()
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
