// Reads the text form of a network. Grammar: one statement a line,
//   fastmaml 1 | input C H W | input D | param OFFSET DIM.. | buffer OFFSET SIZE | KIND VALUE[,VALUE] key=number[,number].. |
//   output VALUE | loss KIND key=number
#include "program/program.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <sstream>
#include <stdexcept>

namespace fastmaml {
namespace {

struct Line {
  std::string text, word;
  std::vector<double> numbers;                            // plain numbers, commas split
  std::map<std::string, std::vector<double>> attributes;  // key=number[,number]
  std::string mode;                                       // mode=word

  [[noreturn]] void fail(const std::string& why) const { throw std::invalid_argument("program line \"" + text + "\": " + why); }

  double real(const std::string& key) const {
    auto it = attributes.find(key);
    if (it == attributes.end() || it->second.size() != 1) fail("needs one number " + key + "=");
    return it->second[0];
  }
  int64_t integer(const std::string& key) const { return static_cast<int64_t>(real(key)); }
  std::pair<int64_t, int64_t> two(const std::string& key) const {
    auto it = attributes.find(key);
    if (it == attributes.end() || it->second.size() != 2) fail("needs two numbers " + key + "=h,w");
    return {static_cast<int64_t>(it->second[0]), static_cast<int64_t>(it->second[1])};
  }
};

// A word of a list in layers.h, and the key of the number that follows it, if any.
template <class Kind>
struct Named {
  Kind kind;
  const char* key;
  double number(const Line& line) const { return *key ? line.real(key) : 0.0; }
};

double to_number(const Line& line, const std::string& text) {
  size_t used = 0;
  double value = 0;
  try {
    value = std::stod(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used == 0 || used != text.size()) line.fail("\"" + text + "\" is not a number");
  return value;
}

std::vector<double> to_numbers(const Line& line, const std::string& list) {
  std::vector<double> numbers;
  std::istringstream in(list);
  for (std::string item; std::getline(in, item, ',');) numbers.push_back(to_number(line, item));
  return numbers;
}

Line read_line(const std::string& text) {
  Line line;
  line.text = text;
  std::istringstream in(text);
  in >> line.word;
  for (std::string token; in >> token;) {
    const size_t equals = token.find('=');
    if (equals == std::string::npos) {
      if (line.word == "loss" && line.mode.empty())
        line.mode = token;
      else
        for (double n : to_numbers(line, token)) line.numbers.push_back(n);
    } else if (token.substr(0, equals) == "mode") {
      line.mode = token.substr(equals + 1);
    } else {
      line.attributes[token.substr(0, equals)] = to_numbers(line, token.substr(equals + 1));
    }
  }
  return line;
}

class Parser {
 public:
  Program parse(const std::string& text) {
    std::istringstream in(text);
    bool header = false, input = false, output = false;
    for (std::string raw; std::getline(in, raw);) {
      if (raw.find_first_not_of(" \t\r") == std::string::npos) continue;
      const Line line = read_line(raw);
      if (!header) {
        if (line.word != "fastmaml" || line.numbers != std::vector<double>{1}) line.fail("expected the header \"fastmaml 1\"");
        header = true;
      } else if (line.word == "input") {
        net_.values.push_back(input_shape(line));
        input = true;
      } else if (line.word == "param") {
        add_param(line);
      } else if (line.word == "buffer") {
        add_buffer(line);
      } else if (line.word == "loss") {
        set_loss(line);
      } else if (line.word == "output") {
        if (line.numbers.size() != 1) line.fail("needs one value");
        net_.output = value(line, 0);
        output = true;
      } else {
        if (!input) line.fail("comes before the input");
        add_node(line);
      }
    }
    if (!header || !input || !output) throw std::invalid_argument("a program needs a header, an input and an output line");
    net_.loss.size = net_.output_shape().size();
    if (net_.loss.kind == Loss::Kind::cross_entropy && net_.output_shape().image)
      throw std::invalid_argument("cross_entropy needs a vector of class scores, but the network's output is an image");
    pool_before_relu();
    return std::move(net_);
  }

 private:
  Program net_;

  static Shape input_shape(const Line& line) {
    Shape s;
    if (line.numbers.size() == 3) {
      s = {int64_t(line.numbers[0]), int64_t(line.numbers[1]), int64_t(line.numbers[2]), true};
    } else if (line.numbers.size() == 1) {
      s = {int64_t(line.numbers[0]), 1, 1, false};
    } else {
      line.fail("an input is C H W or one number D");
    }
    if (s.C <= 0 || s.H <= 0 || s.W <= 0) line.fail("sizes must be positive");
    return s;
  }

  void add_param(const Line& line) {
    if (line.numbers.size() < 2) line.fail("needs an offset and a shape");
    Param p;
    p.offset = int64_t(line.numbers[0]);
    for (size_t i = 1; i < line.numbers.size(); ++i) p.dims.push_back(int64_t(line.numbers[i]));
    p.size = std::accumulate(p.dims.begin(), p.dims.end(), int64_t{1}, std::multiplies<>());
    if (p.offset != net_.param_count) line.fail("parameters must follow each other without gaps");
    net_.param_count = p.offset + p.size;
    net_.params.push_back(p);
  }

  void add_buffer(const Line& line) {
    if (line.numbers.size() != 2) line.fail("needs an offset and a size");
    net_.buffers.push_back({int64_t(line.numbers[0]), int64_t(line.numbers[1])});
    net_.buffer_count = std::max(net_.buffer_count, net_.buffers.back().offset + net_.buffers.back().size);
  }

  void set_loss(const Line& line) {
    static const std::map<std::string, Named<Loss::Kind>> losses = {
#define X(name, key, target) {#name, {Loss::Kind::name, key}},
        FASTMAML_LOSSES(X)
#undef X
    };
    const auto it = losses.find(line.mode);
    if (it == losses.end()) line.fail("unknown loss");
    net_.loss = {it->second.kind, 0, it->second.number(line)};
  }

  int value(const Line& line, size_t i) const {
    if (i >= line.numbers.size()) line.fail("names too few values");
    const double v = line.numbers[i];
    if (v < 0 || v >= double(net_.values.size())) line.fail("names a value that does not exist yet");
    return int(v);
  }

  int param(const Line& line, const std::string& key, const std::vector<int64_t>& dims, Param::Order order = Param::Order::torch) {
    const int64_t index = line.integer(key);
    if (index == -1) return -1;
    if (index < 0 || index >= int64_t(net_.params.size())) line.fail(key + " names a parameter that does not exist");
    Param& p = net_.params[index];
    if (p.dims != dims) line.fail(key + " has the wrong shape");
    if (p.order != Param::Order::torch && p.order != order) line.fail(key + " is shared by layers that store it differently");
    p.order = order;
    return int(index);
  }

  int buffer(const Line& line, const std::string& key, int64_t size) const {
    const int64_t index = line.integer(key);
    if (index < 0 || index >= int64_t(net_.buffers.size())) line.fail(key + " names a buffer that does not exist");
    if (net_.buffers[index].size != size) line.fail(key + " has the wrong size");
    return int(index);
  }

  static Pool2d pool(const Line& line, const Shape& x, std::pair<int64_t, int64_t> kernel) {
    auto [sh, sw] = line.two("stride");
    auto [ph, pw] = line.two("padding");
    return pool(line, x, kernel, sh, sw, ph, pw);
  }
  static Pool2d pool(const Line& line, const Shape& x, std::pair<int64_t, int64_t> kernel, int64_t sh, int64_t sw, int64_t ph, int64_t pw) {
    auto [kh, kw] = kernel;
    if (sh < 1 || sw < 1 || kh < 1 || kw < 1 || ph < 0 || pw < 0) line.fail("kernel and stride must be positive");
    if (2 * ph > kh || 2 * pw > kw) line.fail("padding must be at most half the kernel");
    const int64_t oh = (x.H + 2 * ph - kh) / sh + 1, ow = (x.W + 2 * pw - kw) / sw + 1;
    if (x.H + 2 * ph < kh || x.W + 2 * pw < kw) line.fail("the window is larger than the image");
    return {x.C, x.H, x.W, oh, ow, kh, kw, sh, sw, ph, pw, true};
  }

  const Shape& image(const Line& line, int v) const {
    if (!net_.values[v].image) line.fail("needs an image C H W as input");
    return net_.values[v];
  }

  void add_node(const Line& line) {
    Node node;
    node.inputs = {value(line, 0)};
    const int in = node.inputs[0];
    const Shape x = net_.values[in];
    Shape y = x;
    const std::string& kind = line.word;
    static const std::map<std::string, Named<Pointwise::Kind>> pointwise = {
#define X(name, key) {#name, {Pointwise::Kind::name, key}},
        FASTMAML_POINTWISE(X)
#undef X
    };
    if (auto it = pointwise.find(kind); it != pointwise.end()) {
      node.kind = NodeKind::pointwise;
      node.layer = Pointwise{it->second.kind, it->second.number(line), x.size()};
    } else if (kind == "linear") {
      if (x.image) line.fail("needs a vector as input; flatten the image first");
      const int64_t index = line.integer("weight");
      if (index < 0 || index >= int64_t(net_.params.size()) || net_.params[index].dims.size() != 2) line.fail("weight must be [out, in]");
      const int64_t out = net_.params[index].dims[0];
      node.kind = NodeKind::linear;
      node.weight = param(line, "weight", {out, x.C}, Param::Order::linear);
      node.bias = param(line, "bias", {out});
      node.layer = Linear{x.C, out};
      y = {out, 1, 1, false};
    } else if (kind == "conv2d") {
      image(line, in);
      y = conv2d(line, x, node);
    } else if (kind == "batch_norm") {
      batch_norm(line, x, node);
    } else if (kind == "layer_norm") {
      layer_norm(line, x, node);
    } else if (kind == "group_norm") {
      const int64_t groups = line.integer("groups");
      if (groups < 1 || x.C % groups) line.fail("groups must divide the channels");
      node.kind = NodeKind::group_norm;
      node.weight = param(line, "weight", {x.C});
      node.bias = param(line, "bias", {x.C});
      node.layer = GroupNorm{x.C, x.H * x.W, groups, line.real("eps")};
    } else if (kind == "max_pool2d" || kind == "avg_pool2d") {
      image(line, in);
      Pool2d p = pool(line, x, line.two("kernel"));
      p.count_include_pad = kind == "avg_pool2d" && line.integer("count_include_pad") != 0;
      node.kind = kind == "max_pool2d" ? NodeKind::max_pool2d : NodeKind::avg_pool2d;
      node.layer = p;
      y = {x.C, p.OH, p.OW, true};
    } else if (kind == "global_avg_pool2d") {
      image(line, in);
      node.kind = NodeKind::avg_pool2d;
      node.layer = pool(line, x, {x.H, x.W}, 1, 1, 0, 0);
      y = {x.C, 1, 1, true};
    } else if (kind == "flatten") {
      image(line, in);
      node.kind = NodeKind::flatten;
      node.layer = Flatten{x.C, x.H, x.W};
      y = {x.size(), 1, 1, false};
    } else if (kind == "add") {
      node.inputs.push_back(value(line, 1));
      const Shape& other = net_.values[node.inputs[1]];
      if (other.C != x.C || other.H != x.H || other.W != x.W || other.image != x.image) line.fail("adds values of different shapes");
      node.kind = NodeKind::add;
      node.layer = Add{x.size()};
    } else {
      line.fail("unknown layer");
    }
    net_.nodes.push_back(node);
    net_.values.push_back(y);
  }

  // Returns the output's shape.
  Shape conv2d(const Line& line, const Shape& x, Node& node) {
    const int64_t index = line.integer("weight");
    if (index < 0 || index >= int64_t(net_.params.size()) || net_.params[index].dims.size() != 4)
      line.fail("weight must be [F, C, KH, KW]");
    const std::vector<int64_t> d = net_.params[index].dims;
    const Pool2d window = conv_window(line, x, d[2], d[3]);
    node.kind = NodeKind::conv2d;
    node.weight = param(line, "weight", {d[0], x.C, d[2], d[3]}, Param::Order::conv2d);
    node.bias = param(line, "bias", {d[0]});
    node.layer =
        Conv2d{x.C, x.H, x.W, d[0], window.OH, window.OW, d[2], d[3], window.stride_h, window.stride_w, window.pad_h, window.pad_w};
    return {d[0], window.OH, window.OW, true};
  }

  void batch_norm(const Line& line, const Shape& x, Node& node) {
    node.kind = NodeKind::batch_norm;
    node.weight = param(line, "weight", {x.C});
    node.bias = param(line, "bias", {x.C});
    const bool frozen = line.mode == "frozen";
    if (!frozen && line.mode != "batch" && line.mode != "support") line.fail("mode must be batch, support or frozen");
    if (frozen) {
      node.mean = buffer(line, "mean", x.C);
      node.var = buffer(line, "var", x.C);
    }
    node.support_stats = line.mode == "support";
    node.layer = BatchNorm{x.C, x.H * x.W, line.real("eps"), frozen};
  }

  void layer_norm(const Line& line, const Shape& x, Node& node) {
    const bool all = line.integer("dims") == (x.image ? 3 : 1);
    if (!all) line.fail("layer norm is fused over all dimensions of an example only");
    const std::vector<int64_t> dims = x.image ? std::vector<int64_t>{x.C, x.H, x.W} : std::vector<int64_t>{x.C};
    const Param::Order order = x.image ? Param::Order::image : Param::Order::torch;
    node.kind = NodeKind::group_norm;
    node.weight = param(line, "weight", dims, order);
    node.bias = param(line, "bias", dims, order);
    node.layer = GroupNorm{x.size(), 1, 1, line.real("eps")};
  }

  // A convolution's window: like a pool's, without the limit on padding.
  static Pool2d conv_window(const Line& line, const Shape& x, int64_t kh, int64_t kw) {
    auto [sh, sw] = line.two("stride");
    auto [ph, pw] = line.two("padding");
    if (sh < 1 || sw < 1 || ph < 0 || pw < 0) line.fail("stride must be positive and padding not negative");
    if (x.H + 2 * ph < kh || x.W + 2 * pw < kw) line.fail("the kernel is larger than the padded image");
    return {x.C, x.H, x.W, (x.H + 2 * ph - kh) / sh + 1, (x.W + 2 * pw - kw) / sw + 1, kh, kw, sh, sw, ph, pw, true};
  }

  // pool(relu(x)) and relu(pool(x)) have the same value and derivatives, and the second touches a quarter of the pixels
  // (ALGORITHMS section 7); the same holds for a leaky ReLU with a slope that is not negative.
  void pool_before_relu() {
    std::vector<int> consumers(net_.values.size(), 0);
    for (const Node& node : net_.nodes)
      for (int v : node.inputs) ++consumers[v];
    ++consumers[net_.output];
    for (size_t i = 0; i + 1 < net_.nodes.size(); ++i) {
      Node &act = net_.nodes[i], &pool = net_.nodes[i + 1];
      const int made = int(i) + 1;
      if (act.kind != NodeKind::pointwise || pool.kind != NodeKind::max_pool2d) continue;
      Pointwise f = std::get<Pointwise>(act.layer);
      const bool monotone = f.kind == Pointwise::Kind::relu || (f.kind == Pointwise::Kind::leaky_relu && f.number >= 0);
      if (!monotone || pool.inputs[0] != made || consumers[made] != 1) continue;
      const Shape pooled = net_.values[made + 1];
      pool.inputs[0] = act.inputs[0];
      act.inputs[0] = made;
      f.size = pooled.size();
      act.layer = f;
      std::swap(act, pool);
      net_.values[made] = pooled;
    }
  }
};

}  // namespace

Program Program::parse(const std::string& text) { return Parser().parse(text); }

bool Program::uses_support_stats() const {
  return std::any_of(nodes.begin(), nodes.end(), [](const Node& node) { return node.support_stats; });
}

std::string to_string(const Program& program) {
  static const char* const names[] = {
#define X(name) #name,
      FASTMAML_NODES(X)
#undef X
  };
  std::ostringstream out;
  for (size_t i = 0; i <= program.nodes.size(); ++i) {
    const Shape& shape = program.values[i];
    out << '%' << i << " = ";
    if (i == 0) {
      out << "input";
    } else {
      const Node& node = program.nodes[i - 1];
      out << names[static_cast<int>(node.kind)];
      for (int v : node.inputs) out << " %" << v;
      if (node.weight >= 0) out << " weight=" << program.params[node.weight].offset;
      if (node.bias >= 0) out << " bias=" << program.params[node.bias].offset;
      if (const Rectified y = rectified_output(node.layer); y.on) out << " rectified=" << y.slope;
      if (const Rectified x = rectified_input(node.layer); x.on) out << " mask=" << x.slope;
    }
    out << "  [" << shape.C;
    if (shape.image) out << ' ' << shape.H << ' ' << shape.W;
    out << "]\n";
  }
  out << "output %" << program.output << ", " << program.param_count << " parameters\n";
  return out.str();
}

}  // namespace fastmaml
