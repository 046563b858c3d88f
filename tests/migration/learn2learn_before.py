import learn2learn as l2l
import torch

maml = l2l.algorithms.MAML(model, lr=0.1)
optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)

optimizer.zero_grad()
for support_x, support_y, query_x, query_y in zip(*batch):
    learner = maml.clone()
    for _ in range(2):
        learner.adapt(mse_loss(learner(support_x), support_y))
    query_loss = mse_loss(learner(query_x), query_y) / len(batch[0])
    query_loss.backward()
optimizer.step()
