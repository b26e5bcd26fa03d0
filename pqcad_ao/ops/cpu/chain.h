// Programs of pqcad::chain (ops/chain.py): what stands in them is read, and called without a dispatcher.
#pragma once

#include <bit>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "tensor.h"

namespace {

template <class T> using Argument = torch::stable::detail::unbox_type_t<T>;  // what is kept of a parameter's type

template <class T> bool alike(const T& a, const T& b) { return a == b; }
// Whether two tensors are one, or grids of the same numbers: each layer has its own.
bool alike(const Tensor& a, const Tensor& b) {
  if (a.get() == b.get()) return true;
  if (a.dim() != 2 || b.dim() != 2 || a.scalar_type() != b.scalar_type()) return false;
  if (a.size(0) != b.size(0) || a.size(1) != b.size(1)) return false;
  const Tensor left = dense(a), right = dense(b);
  return !std::memcmp(left.const_data_ptr(), right.const_data_ptr(), left.numel() * left.element_size());
}
bool alike(const std::optional<Tensor>& a, const std::optional<Tensor>& b) {
  return a && b ? alike(*a, *b) : !a && !b;
}
bool alike(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  for (size_t i = 0; i < a.size(); i++)
    if (i == b.size() || !alike(a[i], b[i])) return false;
  return a.size() == b.size();
}

// The latest call of an operator.
template <class Function> struct Latest;
template <class... T> struct Latest<Tensor(T...)> {
  std::optional<std::tuple<Argument<T>...>> given;
  std::optional<Tensor> result;

  bool was(const std::tuple<Argument<T>...>& now) const {
    return given && [&]<size_t... I>(std::index_sequence<I...>) {
      return (alike(std::get<I>(*given), std::get<I>(now)) && ...);
    }(std::index_sequence_for<T...>{});
  }
};

class Program {
  const char *at, *end;
  std::vector<std::optional<Tensor>> values;

  template <class T> using As = std::type_identity<T>;  // what is to be read

  std::optional<Tensor> read(As<std::optional<Tensor>>) {
    const int64_t number = this->number();
    if (number == -1) return {};
    std::optional<Tensor>& held = value(number < 0 ? -2 - number : number);
    return number < 0 ? std::exchange(held, std::nullopt) : held;
  }
  Tensor read(As<Tensor>) {
    std::optional<Tensor> given = read(As<std::optional<Tensor>>{});
    PQCAD_CHECK(given, "a chain gives None where a tensor belongs");
    return *std::move(given);
  }
  template <class T> std::vector<T> read(As<std::vector<T>>) {
    std::vector<T> list;
    for (int64_t left = number(); left > 0; left--) list.push_back(read(As<T>{}));
    return list;
  }
  double read(As<double>) { return std::bit_cast<double>(number()); }
  template <class T> T read(As<T>) { return (T)number(); }

  std::optional<Tensor>& value(int64_t index) {
    PQCAD_CHECK(index >= 0 && index < (int64_t)values.size() && values[index], "a chain has no value ", index);
    return values[index];
  }

 public:
  Program(const std::vector<Tensor>& inputs, const std::string& text)
      : at(text.data()), end(at + text.size()), values(inputs.begin(), inputs.end()) {}

  bool goes_on() const { return at < end; }
  int64_t number() {
    int64_t number = 0;
    const auto [behind, error] = std::from_chars(at, end, number);
    PQCAD_CHECK(error == std::errc{}, "a chain ends within a call, or holds what is no number");
    at = behind < end ? behind + 1 : end;
    return number;
  }
  // Calls an operator with the arguments that stand here; its result is the next value. Where the latest call was given
  // the same it is the latest result: attention's queries, keys and values read one norm, often on equal grids.
  template <class... T> void call(Tensor (*function)(T...), Latest<Tensor(T...)>* latest = nullptr) {
    // in braces: read from the left to the right
    std::tuple<Argument<T>...> given{read(As<Argument<T>>{})...};
    if (!latest) {
      values.push_back(std::apply(function, given));
      return;
    }
    if (!latest->was(given)) latest->result = std::apply(function, given);
    values.push_back(latest->result);
    latest->given = std::move(given);
  }
  // No two of them share memory.
  std::vector<Tensor> results(Sizes indices) {
    std::vector<Tensor> chosen;
    for (auto index : indices) {
      const Tensor& found = *value(index);
      bool is_there = false;
      for (auto& other : chosen) is_there |= other.get() == found.get();
      chosen.push_back(is_there ? torch::stable::clone(found) : found);
    }
    return chosen;
  }
};

}  // namespace
