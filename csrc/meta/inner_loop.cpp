// Reads the text form of an inner loop:
//   steps=K rule= and its settings (FASTMAML_RULES), weight_decay= | clip_value= or clip_norm=
//   order=J minibatch=B queries=k,k,.. rows=parameter,parameter,.. proximal=1 per_task=1 rate_grad=1
#include "meta/inner_loop.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <sstream>
#include <stdexcept>

namespace fastmaml {
namespace {

constexpr int kMostSteps = 1'000'000;

struct RuleRow {
  InnerLoop::Rule rule;
  std::string name;
  std::vector<std::string> keys;  // of its settings
  bool has(const std::string& key) const { return std::find(keys.begin(), keys.end(), key) != keys.end(); }
};
const RuleRow kRules[] = {
#define X(name, ...) {InnerLoop::Rule::name, #name, {__VA_ARGS__}},
    FASTMAML_RULES(X)
#undef X
};

class Word {
 public:
  explicit Word(const std::string& text) : text_(text), equals_(text.find('=')) {
    if (equals_ == std::string::npos) fail("is not key=value");
  }

  std::string key() const { return text_.substr(0, equals_); }
  std::string value() const { return text_.substr(equals_ + 1); }
  [[noreturn]] void fail(const std::string& why) const { throw std::invalid_argument("inner loop word \"" + text_ + "\" " + why); }

  double number(double least, bool open) const {  // open: `least` itself is too small
    const double x = to_number(value());
    if (!std::isfinite(x) || x < least || (open && x == least)) fail(open ? "must be greater than 0" : "must not be negative");
    return x;
  }
  double below_one() const {
    const double x = number(0, false);
    if (x >= 1) fail("must be less than 1");
    return x;
  }
  bool flag() const {
    if (value() != "0" && value() != "1") fail("must be 0 or 1");
    return value() == "1";
  }
  int integer(int least) const { return to_integer(value(), least); }
  std::vector<int> integers() const {
    std::vector<int> all;
    std::istringstream in(value());
    for (std::string item; std::getline(in, item, ',');) all.push_back(to_integer(item, 0));
    if (all.empty()) fail("names nothing");
    if (std::set<int>(all.begin(), all.end()).size() != all.size()) fail("names something twice");
    return all;
  }

 private:
  std::string text_;
  size_t equals_;

  double to_number(const std::string& text) const {
    size_t used = 0;
    double x = 0;
    try {
      x = std::stod(text, &used);
    } catch (const std::exception&) {
      used = 0;
    }
    if (used == 0 || used != text.size()) fail("does not hold a number");
    return x;
  }
  int to_integer(const std::string& text, int least) const {
    const double x = to_number(text);
    if (x != std::floor(x) || x < least || x > kMostSteps)
      fail("must be whole, at least " + std::to_string(least) + " and at most a million");
    return static_cast<int>(x);
  }
};

std::string names_of_rules() {
  std::string names;
  for (const RuleRow& row : kRules) names += (names.empty() ? "" : ", ") + row.name;
  return names;
}

void take(InnerLoop& loop, const Word& word, bool& has_order) {
  const std::string key = word.key();
  if (key == "steps") {
    loop.steps = word.integer(0);
  } else if (key == "rule") {
    const auto known = std::find_if(std::begin(kRules), std::end(kRules), [&](const RuleRow& row) { return row.name == word.value(); });
    if (known == std::end(kRules)) word.fail("is not one of " + names_of_rules());
    loop.rule = known->rule;
  } else if (key == "momentum") {
    loop.momentum = word.number(0, false);
  } else if (key == "dampening") {
    loop.dampening = word.number(0, false);
  } else if (key == "nesterov") {
    loop.nesterov = word.flag();
  } else if (key == "beta1") {
    loop.beta1 = word.below_one();
  } else if (key == "beta2") {
    loop.beta2 = word.below_one();
  } else if (key == "eps") {
    loop.eps = word.number(0, false);
  } else if (key == "decoupled") {
    loop.decoupled = word.flag();
  } else if (key == "weight_decay") {
    loop.weight_decay = word.number(0, false);
  } else if (key == "clip_value") {
    loop.clip_value = word.number(0, true);
  } else if (key == "clip_norm") {
    loop.clip_norm = word.number(0, true);
  } else if (key == "order") {
    loop.order = word.integer(0);
    has_order = true;
  } else if (key == "minibatch") {
    loop.minibatch = word.integer(1);
  } else if (key == "queries") {
    loop.queries = word.integers();
  } else if (key == "rows") {
    loop.rows = word.integers();
  } else if (key == "proximal") {
    loop.proximal = word.flag();
  } else if (key == "per_task") {
    loop.per_task = word.flag();
  } else if (key == "rate_grad") {
    loop.rate_grad = word.flag();
  } else {
    word.fail("is not known");
  }
}

}  // namespace

bool InnerLoop::is_query(int k) const { return std::binary_search(queries.begin(), queries.end(), k); }

int InnerLoop::states() const {
  switch (rule) {
    case Rule::sgd:
      return momentum != 0 ? 1 : 0;
    case Rule::adam:
      return 2;
  }
  throw std::logic_error("not an update rule");
}

InnerLoop InnerLoop::parse(const std::string& text) {
  const auto fail = [&](const std::string& why) { throw std::invalid_argument("inner loop \"" + text + "\" " + why); };
  InnerLoop loop;
  loop.text = text;
  std::set<std::string> seen;
  bool has_order = false;
  std::istringstream in(text);
  for (std::string token; in >> token;) {
    const Word word(token);
    if (!seen.insert(word.key()).second) word.fail("comes twice");
    take(loop, word, has_order);
  }
  if (!seen.count("steps")) fail("does not say steps=");
  loop.order = has_order ? std::min(loop.order, loop.steps) : loop.steps;
  const RuleRow& own = kRules[static_cast<int>(loop.rule)];
  for (const RuleRow& other : kRules)
    for (const std::string& key : other.keys)
      if (seen.count(key) && !own.has(key)) fail("has " + key + "=, which goes with rule=" + other.name);
  if (loop.nesterov && loop.momentum == 0) fail("has nesterov=1 without momentum=");
  if (loop.clip_value > 0 && loop.clip_norm > 0) fail("clips by value and by norm; choose one");
  if (loop.proximal && loop.clips()) fail("clips the gradient beside a proximal term, which is not defined");
  std::sort(loop.queries.begin(), loop.queries.end());
  if (!loop.queries.empty() && loop.queries.back() > loop.steps) fail("takes a query loss behind its last step");
  if (loop.queries.empty() || loop.queries.back() < loop.steps) loop.queries.push_back(loop.steps);
  return loop;
}

}  // namespace fastmaml
