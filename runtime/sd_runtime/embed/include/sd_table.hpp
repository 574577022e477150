// A sampler as a table, and the loop that runs any of them: C++20, no library, no Python.
//
//     const auto table = sd::Table::from_json(text);  // of sd-export schedule
//     sd::denoise(table, latents, unet, noise);
//
// The first latents are init_noise_scale · noise for text to image, and for image to image
// noised_alpha[0] · latents of the picture + noised_sigma[0] · noise.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace sd {

namespace detail {

// The numbers of a JSON text by their key: nested lists flattened, true 1, false 0; texts and
// null leave none.
class Numbers {
 public:
  explicit Numbers(std::string_view text) : rest_(text) {
    value(nullptr, 0);
    if (peek() != '\0') fail();
  }

  const std::vector<double>& operator[](const std::string& key) const {
    const auto found = by_key_.find(key);
    if (found == by_key_.end()) throw std::runtime_error("the schedule has no " + key);
    return found->second;
  }

 private:
  [[noreturn]] static void fail() { throw std::runtime_error("the schedule is no JSON"); }

  char peek() {
    const auto start = rest_.find_first_not_of(" \t\r\n");
    rest_.remove_prefix(start == std::string_view::npos ? rest_.size() : start);
    return rest_.empty() ? '\0' : rest_.front();
  }

  bool take(char expected) {
    if (peek() != expected) return false;
    rest_.remove_prefix(1);
    return true;
  }

  bool take(std::string_view word) {
    if (!rest_.starts_with(word)) return false;
    rest_.remove_prefix(word.size());
    return true;
  }

  std::string string() {
    if (!take('"')) fail();
    std::string text;
    while (!rest_.empty() && rest_.front() != '"') {
      if (rest_.front() == '\\') rest_.remove_prefix(1);  // no key of ours has one
      if (rest_.empty()) fail();
      text += rest_.front();
      rest_.remove_prefix(1);
    }
    if (!take('"')) fail();
    return text;
  }

  void number(std::vector<double>* into) {
    double read = 0;
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), read);
    if (error != std::errc()) fail();
    rest_.remove_prefix(static_cast<std::size_t>(end - rest_.data()));
    if (into != nullptr) into->push_back(read);
  }

  void value(std::vector<double>* into, int depth) {
    if (depth > 8) fail();
    const char first = peek();
    if (first == '{') {
      take('{');
      if (take('}')) return;
      do {
        const std::string key = string();
        if (!take(':')) fail();
        value(&by_key_[key], depth + 1);
      } while (take(','));
      if (!take('}')) fail();
    } else if (first == '[') {
      take('[');
      if (take(']')) return;
      do value(into, depth + 1);
      while (take(','));
      if (!take(']')) fail();
    } else if (first == '"') {
      string();
    } else if (take("true") || take("false")) {
      if (into != nullptr) into->push_back(first == 't' ? 1 : 0);
    } else if (!take("null")) {
      number(into);
    }
  }

  std::string_view rest_;
  std::map<std::string, std::vector<double>> by_key_;
};

}  // namespace detail

// One row per UNet call. Throws std::runtime_error where the text is no schedule.
struct Table {
  std::vector<double> timesteps;     // [rows] what the UNet is told
  std::vector<double> pred_sample;   // [rows] p } h = p · sample + q · model_output
  std::vector<double> pred_output;   // [rows] q }
  std::vector<double> coef_sample;   // [rows] a } sample' = a · sample + Σ b[k] · h of k rows ago
  std::vector<double> coef_history;  // [rows][depth] b }                + c · noise
  std::vector<double> coef_noise;    // [rows] c }
  std::vector<double> draws_noise;   // [rows] 1 where noise is drawn, be its coefficient 0 or not
  std::vector<double> alpha, sigma, noised_alpha, noised_sigma;  // [rows + 1]
  double init_noise_scale = 1, guidance_scale = 1;
  std::size_t guided_rows_begin = 0, guided_rows_end = 0;  // the end itself is not guided

  std::size_t num_rows() const { return timesteps.size(); }
  std::size_t depth() const { return coef_history.size() / num_rows(); }
  bool is_guided(std::size_t row) const {
    return guided_rows_begin <= row && row < guided_rows_end;
  }

  static Table from_json(std::string_view text) {
    const detail::Numbers fields(text);
    const auto single = [&](const char* key) {
      if (fields[key].size() != 1) throw std::runtime_error(std::string(key) + " is no number");
      return fields[key][0];
    };
    if (single("format_version") != 1)
      throw std::runtime_error("the schedule is of another format_version");
    const std::size_t rows = fields["timesteps"].size();
    const auto column = [&](const char* key, std::size_t size) {
      if (fields[key].size() != size)
        throw std::runtime_error(std::string(key) + " is of another length than timesteps");
      return fields[key];
    };
    const auto& history = fields["coef_history"];
    const auto& guided = fields["guided_rows"];
    if (rows == 0 || history.empty() || history.size() % rows != 0 || guided.size() != 2)
      throw std::runtime_error("the schedule has no rows");
    return {
        .timesteps = fields["timesteps"],
        .pred_sample = column("pred_sample", rows),
        .pred_output = column("pred_output", rows),
        .coef_sample = column("coef_sample", rows),
        .coef_history = history,
        .coef_noise = column("coef_noise", rows),
        .draws_noise = column("draws_noise", rows),
        .alpha = column("alpha", rows + 1),
        .sigma = column("sigma", rows + 1),
        .noised_alpha = column("noised_alpha", rows + 1),
        .noised_sigma = column("noised_sigma", rows + 1),
        .init_noise_scale = single("init_noise_scale"),
        .guidance_scale = single("guidance_scale"),
        .guided_rows_begin = static_cast<std::size_t>(guided[0]),
        .guided_rows_end = static_cast<std::size_t>(guided[1]),
    };
  }
};

// Runs table on sample, in place. unet(row, sample, model_output) fills model_output, guided on
// the rows where table.is_guided(row): n + guidance_scale · (p − n) of the outputs n and p with the
// negative prompt and the prompt. noise(values) fills values with standard normals.
template <typename Unet, typename Noise>
void denoise(const Table& table, std::span<float> sample, Unet&& unet, Noise&& noise) {
  const std::size_t size = sample.size(), depth = table.depth();
  std::vector<float> model_output(size), drawn(size);
  std::vector<std::vector<float>> history(depth, std::vector<float>(size));
  for (std::size_t row = 0; row < table.num_rows(); row++) {
    unet(row, std::span<const float>(sample), std::span<float>(model_output));
    const auto p = static_cast<float>(table.pred_sample[row]);
    const auto q = static_cast<float>(table.pred_output[row]);
    const auto a = static_cast<float>(table.coef_sample[row]);
    auto& newest = history[row % depth];
    for (std::size_t i = 0; i < size; i++) {
      newest[i] = p * sample[i] + q * model_output[i];
      sample[i] *= a;
    }
    for (std::size_t age = 0; age < std::min(depth, row + 1); age++) {
      const auto b = static_cast<float>(table.coef_history[row * depth + age]);
      const auto& h = history[(row - age) % depth];
      for (std::size_t i = 0; i < size; i++) sample[i] += b * h[i];
    }
    if (table.draws_noise[row] != 0) {
      noise(std::span<float>(drawn));
      const auto c = static_cast<float>(table.coef_noise[row]);
      for (std::size_t i = 0; i < size; i++) sample[i] += c * drawn[i];
    }
  }
}

}  // namespace sd
