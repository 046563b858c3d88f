import torch
from torch.func import functional_call, grad, vmap

optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)


def task_loss(support_x, support_y, query_x, query_y):
    params = dict(model.named_parameters())
    for _ in range(2):
        grads = grad(lambda p: mse_loss(functional_call(model, p, (support_x,)), support_y))(params)
        params = {name: p - 0.1 * grads[name] for name, p in params.items()}
    return mse_loss(functional_call(model, params, (query_x,)), query_y)


optimizer.zero_grad()
vmap(task_loss)(*batch).mean().backward()
optimizer.step()
