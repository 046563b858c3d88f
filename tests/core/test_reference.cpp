// Does the float64 reference agree with finite differences, with values worked out by hand, with itself in every layout?
// One program of several files: its last checks ask whether the others ran every op, and run again all that they ran.
#include "reference_activations.h"
#include "reference_losses.h"
#include "reference_norms.h"
#include "reference_products.h"
#include "reference_updates.h"

namespace {

void test_tree_reduce() {
  const OpTable& table = reference_ops();
  for (const int64_t T : {1, 2, 3, 5, 8, 11}) {
    const int64_t size = 3;
    const Vec x = draw(T * size), w = draw(T);
    Vec sum(size, 0.0), mean(size, 0.0);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t i = 0; i < size; ++i) {
        sum[i] += w[t] * x[t * size + i];
        mean[i] += x[t * size + i] / static_cast<double>(T);
      }
    Vec leaves = x, weighted = hole(size), plain = hole(size);
    table.tree_reduce(weighted.data(), leaves.data(), w.data(), T, size, size, 0);
    leaves = x;
    table.tree_reduce(plain.data(), leaves.data(), nullptr, T, size, size, 0);
    expect_close("tree_reduce of " + std::to_string(T) + " tasks", {weighted, plain}, {sum, mean}, kRounding);
  }
  // 1 + 2^-53 is 1 again, 2^-53 + 2^-53 counts: only ((a + b) + (c + d)) gives the next number after 2.
  const double tiny = std::ldexp(1.0, -53);
  Vec leaves{1, 1, 2 * tiny, 2 * tiny, 5}, w{1, 1, 1, 1, 0}, out(1);
  table.tree_reduce(out.data(), leaves.data(), w.data(), 5, 1, 1, 0);
  expect_close("tree_reduce adds neighbours first", {out}, {{2 + 4 * tiny}}, 0);
}

void test_table() {
  const OpTable& table = reference_ops();
  for (int op = 0; op < kOps; ++op) {
    if (is_python_loss(static_cast<Op>(op))) continue;
    bool ran = false;
    for (const Recorded& r : recorded) ran = ran || static_cast<int>(r.what.op) == op;
    report(std::string(op_name(static_cast<Op>(op))) + " is in the table and was tested", table.run[op] && ran, "");
  }
  report("the table is float64 and knows lanes", table.real_bytes == 8 && table.lanes == kAnyLanes && table.tree_reduce, "");
}

// Task t's data: the recorded operands scaled, but labels, indices and the holes of outputs as they are.
void test_layouts() {
  for (const Recorded& r : recorded) {
    const std::vector<std::string> role = roles(r.what.op);
    bool exact = true, alone = true, share = true;
    for (const int64_t T : {3, 11}) {
      std::vector<Values> tasks;
      for (int64_t t = 0; t < T; ++t) {
        tasks.push_back(r.before);
        for (size_t k = 0; k < role.size(); ++k)
          if (role[k] != "labels" && role[k] != "index" && role[k] != "tap")
            for (double& v : tasks.back()[k]) v *= 1 + 0.1 * static_cast<double>(t);
      }
      const std::vector<bool> none(role.size(), false);
      std::vector<Values> major = tasks, lanes = tasks;
      run_tasks(r.what, major, 1, none);
      run_tasks(r.what, lanes, 8, none);
      for (int64_t t = 0; t < T; ++t) {
        std::vector<Values> one{tasks[t]};
        run_tasks(r.what, one, 1, none);
        for (size_t k = 0; k < role.size(); ++k) {
          exact = exact && same_bits(lanes[t][k], major[t][k]);
          alone = alone && same_bits(one[0][k], major[t][k]);
        }
      }
      // Whatever task 0 did not write is an input and may be shared by all tasks.
      std::vector<bool> input(role.size());
      for (size_t k = 0; k < role.size(); ++k) input[k] = same_bits(tasks[0][k], major[0][k]);
      for (const int layout : {1, 8}) {
        std::vector<Values> shared(T, tasks[0]);
        run_tasks(r.what, shared, layout, input);
        for (int64_t t = 0; t < T; ++t)
          for (size_t k = 0; k < role.size(); ++k) share = share && same_bits(shared[t][k], major[0][k]);
      }
    }
    const std::string name = std::string(op_name(r.what.op)) + " N=" + std::to_string(r.what.examples);
    report(name + ": 3 and 11 tasks in 8 lanes have the bits of task-major ones", exact, "");
    report(name + ": a task's bits do not depend on its batch", alone, "");
    report(name + ": inputs shared by all tasks", share, "");
  }
}

}  // namespace

int main() {
  test_vectors();
  test_clips();
  test_linear_updates();
  test_pointwise_dual();
  test_momentum();
  test_adam();
  test_products();
  test_batch_norms();
  test_group_norms();
  test_pointwise();
  test_pools();
  test_norm_pool_acts();
  test_flatten();
  test_losses();
  test_tree_reduce();
  test_conjugate_gradient();
  test_table();
  test_layouts();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
