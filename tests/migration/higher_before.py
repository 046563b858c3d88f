import higher
import torch

inner = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

optimizer.zero_grad()
for support_x, support_y, query_x, query_y in zip(*batch):
    with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (learner, inner_step):
        for _ in range(2):
            inner_step.step(mse_loss(learner(support_x), support_y))
        query_loss = mse_loss(learner(query_x), query_y) / len(batch[0])
        query_loss.backward()
optimizer.step()
