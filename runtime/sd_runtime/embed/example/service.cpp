// A service in little: prompts come in a line each, pictures go out as PNG files, drawn in order
// while further lines are read. service BUNDLE FOLDER < prompts.txt prints a path for each.
#include <deque>
#include <exception>
#include <fstream>
#include <iostream>
#include <string>

#include "sd_runtime.hpp"

namespace {

void write(const sd::Job& job, const std::string& path) {
  const sd::Result result = job.result();
  const auto file = result.file(0);
  std::ofstream out(path, std::ios::binary);
  out.write(reinterpret_cast<const char*>(file.data()), static_cast<std::streamsize>(file.size()));
  if (!out.flush()) throw std::runtime_error("cannot write " + path);
  std::cout << path << std::endl;
}

void serve(const char* bundle, const std::string& folder) {
  const sd::Context context({.bundle = bundle, .queue_size = 8});
  std::deque<std::pair<sd::Job, std::string>> jobs;
  const auto write_first = [&jobs] {
    write(jobs.front().first, jobs.front().second);
    jobs.pop_front();
  };
  std::string prompt;
  for (int number = 0; std::getline(std::cin, prompt); number++) {
    while (jobs.size() >= 8) write_first();
    jobs.emplace_back(context.submit({.prompt = prompt, .seed = 7, .format = "png"}),
                      folder + "/" + std::to_string(number) + ".png");
    while (!jobs.empty() && jobs.front().first.state() >= sd::State::succeeded) write_first();
  }
  while (!jobs.empty()) write_first();
  std::cerr << context.statistics() << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "service BUNDLE FOLDER < prompts.txt\n";
    return 2;
  }
  try {
    serve(argv[1], argv[2]);
  } catch (const sd::Error& error) {
    std::cerr << error.what() << "\n" << error.hint() << "\n";
    return static_cast<int>(error.code());
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
