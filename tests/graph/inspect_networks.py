"""Networks and hooks for the tests of inspection."""

import copy

import torch
from torch import nn


class Net(nn.Module):
    """Convolutions, one of them shared, batch norm, activations in place, dropout, a residual sum, a dict."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU())
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.body(self.body(x)) + x
        pooled = self.drop(x.mean((2, 3)))
        return {"logits": self.head(pooled), "pooled": pooled}


class Stubborn(Net):
    """The same in a form that can only be recorded: a part without gradients is a graph of its own to torch.export."""

    def forward(self, x):
        with torch.no_grad():
            x = x * 1.5
        return super().forward(x)


NETS = [Net, Stubborn]


def make(kind=Net, seed=0):
    torch.manual_seed(seed)
    return kind().train(), torch.randn(6, 3, 8, 8)


def loss(output):
    return output["logits"].square().sum() + output["pooled"].sum()


def hooked(model, x):
    """Outputs, inputs and gradients of the leaf modules' calls, from the model itself."""
    calls, handles = {}, []

    def before(module, args):
        module.given = args[0].detach().clone()

    def after(module, args, output):
        path = paths[id(module)]
        call = {"output": output.detach().clone(), "input": module.given, "gradient": None}
        calls.setdefault(path, []).append(call)
        output.register_hook(lambda gradient: call.update(gradient=gradient.clone()))

    model = copy.deepcopy(model)
    paths = {id(module): path for path, module in model.named_modules()}
    for module in model.modules():
        if not [*module.children()]:
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    loss(model(x.clone())).backward()
    for handle in handles:
        handle.remove()
    return calls


def channels(value):
    return value.double().transpose(0, 1).flatten(1)


def flat_images():
    """Images of one colour, which a prediction cannot know: the mean of nine equal pixels has the pixel's spread."""
    torch.manual_seed(0)
    mean = nn.Conv2d(1, 1, 3, bias=False)
    nn.init.constant_(mean.weight, 1 / 9)
    return nn.Sequential(nn.Identity(), mean), torch.randn(100, 1, 1, 1).expand(100, 1, 8, 8).contiguous()
