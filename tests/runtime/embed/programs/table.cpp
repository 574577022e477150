// table SCHEDULE LATENTS NOISE OUTPUT: runs a schedule on a made-up linear model; float32 files.
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>

#include "sd_table.hpp"

namespace {

std::string read(const char* path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::vector<float> floats(const char* path) {
  const std::string bytes = read(path);
  std::vector<float> values(bytes.size() / sizeof(float));
  std::copy(bytes.begin(), bytes.end(), reinterpret_cast<char*>(values.data()));
  return values;
}

}  // namespace

int main(int, char** argv) {
  try {
    const auto table = sd::Table::from_json(read(argv[1]));
    std::vector<float> latents = floats(argv[2]), noise = floats(argv[3]);
    std::size_t next = 0;
    sd::denoise(
        table, latents,
        [&](std::size_t row, std::span<const float> sample, std::span<float> model_output) {
          const float scale = table.is_guided(row) ? static_cast<float>(table.guidance_scale) : 1;
          const float shift = static_cast<float>(table.timesteps[row]) / 1000;
          for (std::size_t i = 0; i < sample.size(); i++) {
            const float negative = 0.5f * sample[i] + shift, positive = 0.75f * sample[i] - shift;
            model_output[i] = scale == 1 ? positive : negative + scale * (positive - negative);
          }
        },
        [&](std::span<float> drawn) {
          std::copy_n(noise.begin() + static_cast<std::ptrdiff_t>(next), drawn.size(),
                      drawn.begin());
          next += drawn.size();
        });
    std::ofstream(argv[4], std::ios::binary)
        .write(reinterpret_cast<const char*>(latents.data()),
               static_cast<std::streamsize>(latents.size() * sizeof(float)));
    return next == noise.size() ? 0 : 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
}
