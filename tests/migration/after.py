import fastmaml as fm
import torch

maml = fm.MAML(model, inner_lr=0.1, inner_steps=2, loss="mse")
optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)

optimizer.zero_grad()
maml(*batch).loss.backward()
optimizer.step()
