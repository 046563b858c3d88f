import torch
import torchopt

inner = torchopt.MetaSGD(model, lr=0.1)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

optimizer.zero_grad()
start = torchopt.extract_state_dict(model, by="reference"), torchopt.extract_state_dict(inner, by="reference")
for support_x, support_y, query_x, query_y in zip(*batch):
    for _ in range(2):
        inner.step(mse_loss(model(support_x), support_y))
    query_loss = mse_loss(model(query_x), query_y) / len(batch[0])
    query_loss.backward()
    torchopt.recover_state_dict(model, start[0])
    torchopt.recover_state_dict(inner, start[1])
optimizer.step()
