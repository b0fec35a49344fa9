// Runs one case of kernels.h and prints what came of it as JSON: {"error": code, "message": text, "values": [...]}.
// Usage: driver CASE [NUMBER...]; the seed comes from ECHO_RT_EMULATION_SEED.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "common/ptx.cuh"
#include "kernels.h"

namespace {

using echo::ScalarType;
using echo::test::Fault;
using Arguments = std::vector<int>;

struct Outcome {
  cudaError_t error = cudaSuccess;
  std::string message;
  std::vector<double> values;
};

template <class T>
Outcome outcome(cudaError_t error, const std::vector<T>& values) {
  return {error, error == cudaSuccess ? "" : echo::describe_error(error), {values.begin(), values.end()}};
}

// Values in [-1, 1) that are the same everywhere.
struct Numbers {
  uint32_t state = 12345;
  float next() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
  }
  std::vector<float> take(size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = next();
    return values;
  }
};

// Of c [m, n], whose elements are sums of k terms: relative error in float64, and how many are not finite.
template <class Term>
std::vector<double> error_of(const std::vector<float>& c, int m, int n, int k, Term&& term) {
  double difference = 0, norm = 0, broken = 0;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double expected = 0;
      for (int l = 0; l < k; ++l) expected += term(i, j, l);
      const double actual = c[i * n + j];
      norm += expected * expected;
      if (std::isfinite(actual)) {
        difference += (actual - expected) * (actual - expected);
      } else {
        ++broken;
      }
    }
  }
  return {std::sqrt(difference / norm), broken};
}

// What error_of says. Arguments: half?, m, n, k, fault.
template <class T>
Outcome product_of(ScalarType dtype, int m, int n, int k, Fault fault) {
  Numbers numbers;
  std::vector<T> a(static_cast<size_t>(m) * k), b(static_cast<size_t>(k) * n);
  for (T& value : a) value = echo::from_float<T>(numbers.next());
  for (T& value : b) value = echo::from_float<T>(numbers.next());
  std::vector<float> c(static_cast<size_t>(m) * n, NAN);
  const cudaError_t error = echo::test::launch_product({a.data(), b.data(), c.data(), m, n, k, dtype, fault}, nullptr);
  return outcome<double>(error, error_of(c, m, n, k, [&](int i, int j, int l) {
                           return double{echo::to_float(a[i * k + l])} * echo::to_float(b[l * n + j]);
                         }));
}

Outcome product(const Arguments& arguments) {
  const int m = arguments.at(1), n = arguments.at(2), k = arguments.at(3);
  const auto fault = static_cast<Fault>(arguments.at(4));
  return arguments.at(0) != 0 ? product_of<__half>(ScalarType::kFloat16, m, n, k, fault)
                              : product_of<__nv_bfloat16>(ScalarType::kBFloat16, m, n, k, fault);
}

// The same of a warpgroup: [64, k] by [96, k]. Arguments: half?, k, fault, pipelined?
template <class T>
Outcome warpgroup_product_of(ScalarType dtype, int k, Fault fault, bool pipelined) {
  constexpr int m = 64, n = 96;
  Numbers numbers;
  std::vector<T> a(static_cast<size_t>(m) * k), b(static_cast<size_t>(n) * k);
  for (T& value : a) value = echo::from_float<T>(numbers.next());
  for (T& value : b) value = echo::from_float<T>(numbers.next());
  std::vector<float> c(static_cast<size_t>(m) * n, NAN);
  echo::test::ProductParams params{a.data(), b.data(), c.data(), m, n, k, dtype, fault};
  std::vector<T> slabs;  // [k / 16, 2, n, 8]
  for (int chunk = 0; chunk < k; chunk += 8) {
    for (int j = 0; j < n; ++j) slabs.insert(slabs.end(), &b[j * k + chunk], &b[j * k + chunk] + 8);
  }
  if (pipelined) params.b = slabs.data();
  const cudaError_t error = pipelined ? echo::test::launch_pipelined_product(params, nullptr)
                                      : echo::test::launch_warpgroup_product(params, nullptr);
  return outcome<double>(error, error_of(c, m, n, k, [&](int i, int j, int l) {
                           return double{echo::to_float(a[i * k + l])} * echo::to_float(b[j * k + l]);
                         }));
}

Outcome warpgroup_product(const Arguments& arguments) {
  const int k = arguments.at(1);
  const auto fault = static_cast<Fault>(arguments.at(2));
  const bool pipelined = arguments.at(3) != 0;
  return arguments.at(0) != 0 ? warpgroup_product_of<__half>(ScalarType::kFloat16, k, fault, pipelined)
                              : warpgroup_product_of<__nv_bfloat16>(ScalarType::kBFloat16, k, fault, pipelined);
}

// How many of 3 x 128 elements are wrong. Arguments: rounds, fault.
Outcome reverse(const Arguments& arguments) {
  const int blocks = 3, size = 128, rounds = arguments.at(0);
  std::vector<float> rows = Numbers().take(size_t{blocks} * size), expected = rows;
  for (int round = 0; round < rounds; ++round) {
    const std::vector<float> before = expected;
    for (int i = 0; i < blocks * size; ++i) {
      expected[i] = before[i / size * size + size - 1 - i % size] + static_cast<float>(round);
    }
  }
  const auto fault = static_cast<Fault>(arguments.at(1));
  const cudaError_t error = echo::test::launch_reverse(rows.data(), blocks, rounds, fault, nullptr);
  double wrong = 0, not_numbers = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    wrong += rows[i] != expected[i];
    not_numbers += std::isnan(rows[i]);
  }
  return outcome<double>(error, {wrong, not_numbers});
}

Outcome swap_neighbours(const Arguments& arguments) {
  const std::vector<float> in = Numbers().take(32);
  std::vector<float> out(32, NAN);
  const auto fault = static_cast<Fault>(arguments.at(0));
  const cudaError_t error = echo::test::launch_swap_neighbours(in.data(), out.data(), fault, nullptr);
  double wrong = 0;
  for (int i = 0; i < 32; ++i) wrong += out[i] != in[i ^ 1];
  return outcome<double>(error, {wrong});
}

// Largest relative error of the sums, of the maximum and of the total. Arguments: rows, size.
Outcome sums(const Arguments& arguments) {
  const int rows = arguments.at(0), size = arguments.at(1);
  const std::vector<float> in = Numbers().take(static_cast<size_t>(rows) * size);
  std::vector<float> row_sums(rows, NAN), largest(rows, NAN);
  float total = 0;
  const cudaError_t error =
      echo::test::launch_sums(in.data(), row_sums.data(), largest.data(), &total, rows, size, nullptr);
  double worst_sum = 0, worst_largest = 0, expected_total = 0, scale = std::sqrt(static_cast<double>(size));
  for (int row = 0; row < rows; ++row) {
    double sum = 0;
    for (int i = 0; i < size; ++i) sum += in[row * size + i];
    expected_total += sum;
    // NaN must not vanish in a maximum.
    if (!(std::abs(row_sums[row] - sum) / scale <= worst_sum)) worst_sum = std::abs(row_sums[row] - sum) / scale;
    const double difference = std::abs(largest[row] - std::abs(sum)) / scale;
    if (!(difference <= worst_largest)) worst_largest = difference;
  }
  return outcome<double>(error, {worst_sum, worst_largest, std::abs(total - expected_total) / scale});
}

Outcome collectives(const Arguments&) {
  std::vector<int> out(7 * 32, -1);
  const cudaError_t error = echo::test::launch_collectives(out.data(), nullptr);
  return outcome(error, out);
}

Outcome fragments(const Arguments&) {
  std::vector<uint32_t> out(256);
  const cudaError_t error = echo::test::launch_fragments(out.data(), nullptr);
  return outcome(error, out);
}

// Arguments: fault, threads, dynamic bytes. A right launch follows on the same thread and must not notice.
Outcome mistake(const Arguments& arguments) {
  std::vector<float> out(2048, NAN);
  const auto fault = static_cast<Fault>(arguments.at(0));
  const cudaError_t error = echo::test::launch_mistake(out.data(), arguments.at(1), arguments.at(2), fault, nullptr);
  Outcome result = outcome<double>(error, {});
  result.values.push_back(collectives({}).error);
  result.values.push_back(echo::emulation::last_error().empty());
  return result;
}

// Bits of value i as float32 of a bfloat16 and of a half, for all 2^16; then what float32 bits i · step round to.
Outcome conversions(const Arguments& arguments) {
  std::vector<uint32_t> out;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    out.push_back(echo::emulation::bits_of(echo::to_float(__nv_bfloat16{static_cast<uint16_t>(bits)})));
    out.push_back(echo::emulation::bits_of(echo::to_float(__half{static_cast<uint16_t>(bits)})));
  }
  const auto step = static_cast<uint32_t>(arguments.at(0));
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += step) {
    const float value = echo::emulation::float_of(static_cast<uint32_t>(bits));
    out.push_back(echo::pack<__nv_bfloat16>(value, 0.0f) | echo::pack<__half>(0.0f, value));
  }
  return outcome(cudaSuccess, out);
}

// The float8 that every bfloat16 rounds to, and float32 bits i · step; each beside its negative in one pair.
Outcome float8_conversions(const Arguments& arguments) {
  std::vector<uint32_t> out;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = echo::emulation::float_of(bits << 16);
    out.push_back(echo::pack_float8(value, -value));
  }
  const auto step = static_cast<uint32_t>(arguments.at(0));
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += step) {
    const float value = echo::emulation::float_of(static_cast<uint32_t>(bits));
    out.push_back(echo::pack_float8(value, -value));
  }
  return outcome(cudaSuccess, out);
}

// Launches on two host threads at once, each its own kernel.
Outcome two_host_threads(const Arguments&) {
  Outcome first, second;
  std::thread other([&] { first = product({0, 64, 64, 128, 0}); });
  second = mistake({static_cast<int>(Fault::kDivergentBarrier), 64, 0});
  other.join();
  first.values.push_back(second.error);
  return first;
}

// Nanoseconds of one barrier, one shuffle (each of one thread), and MFLOP/s of a product. Arguments: threads.
Outcome speed(const Arguments& arguments) {
  const int threads = arguments.at(0), rounds = 20000;
  const auto seconds = [](const std::function<void()>& work) {
    const std::clock_t start = std::clock();  // of this process: others may be busy
    work();
    return static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  };
  std::vector<float> out(1024);
  const double each = 1e9 / (static_cast<double>(rounds) * threads), flop = 2.0 * 128 * 128 * 2048;
  std::vector<__nv_bfloat16> a(128 * 2048), b(2048 * 128);
  std::vector<float> c(128 * 128);
  const echo::test::ProductParams params{a.data(), b.data(), c.data(), 128, 128, 2048, ScalarType::kBFloat16};
  const double barrier = seconds([&] { echo::test::launch_barriers(threads, rounds, nullptr); }) * each;
  const double shuffle = seconds([&] { echo::test::launch_shuffles(out.data(), threads, rounds, nullptr); }) * each;
  const double rate = flop / seconds([&] { echo::test::launch_product(params, nullptr); }) / 1e6;
  return outcome<double>(cudaSuccess, {barrier, shuffle, rate});
}

}  // namespace

int main(int count, char** words) {
  const std::map<std::string, Outcome (*)(const Arguments&)> cases = {
      {"product", product},
      {"warpgroup_product", warpgroup_product},
      {"reverse", reverse},
      {"swap_neighbours", swap_neighbours},
      {"sums", sums},
      {"fragments", fragments},
      {"collectives", collectives},
      {"mistake", mistake},
      {"speed", speed},
      {"conversions", conversions},
      {"float8_conversions", float8_conversions},
      {"two_host_threads", two_host_threads},
  };
  if (count < 2 || cases.count(words[1]) == 0) return 2;
  Arguments arguments;
  for (int i = 2; i < count; ++i) arguments.push_back(std::atoi(words[i]));
  const Outcome result = cases.at(words[1])(arguments);
  std::string message;
  for (char c : result.message) message += c == '"' || c == '\\' ? '\'' : c;
  std::printf("{\"error\": %d, \"message\": \"%s\", \"values\": [", result.error, message.c_str());
  for (size_t i = 0; i < result.values.size(); ++i) {
    std::printf(std::isnan(result.values[i]) ? "%sNaN" : "%s%.17g", i == 0 ? "" : ", ", result.values[i]);
  }
  std::printf("]}\n");
  return 0;
}
