// chain: several operations as one custom call, whose handlers are called one after the other. So
// their kernels are neighbours in one stream or CUDA graph, and each may start while the one before
// it ends; between custom calls XLA lets none.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "chained.h"
#include "ffi/module.h"

namespace flashmla::ffi {

// Attributes of a chain, beside those of call i, whose names begin with "i.":
//   targets  its calls' custom-call targets, each followed by a space
//   words    [] int64, of each call: the number of its operands; of each the index (the chain's
//            operands, then all calls' results so far), rank and dimensions; the number of its
//            results; of each the place (i, the chain's result i, or -1 - offset in bytes, in the
//            workspace, which is the chain's last result), type, rank and dimensions
class Chain {
 public:
  explicit Chain(const XLA_FFI_CallFrame& frame) : frame_(frame) {}

  XLA_FFI_Error* run() {
    std::string_view targets;
    for (int64_t i = 0; i < frame_.attrs.size; ++i) {
      const auto type = frame_.attrs.types[i];
      const void* value = frame_.attrs.attrs[i];
      if (name_of(i) == "targets" && type == XLA_FFI_AttrType_STRING) {
        const auto* span = static_cast<const XLA_FFI_ByteSpan*>(value);
        targets = {span->ptr, span->len};
      }
      if (name_of(i) == "words" && type == XLA_FFI_AttrType_ARRAY) {
        const auto* array = static_cast<const XLA_FFI_Array*>(value);
        if (array->dtype != XLA_FFI_DataType_S64) return fail("words must be int64");
        next_ = static_cast<int64_t*>(array->data), left_ = array->size;
      }
    }
    for (int call = 0; !targets.empty(); ++call) {
      const size_t end = targets.find(' ');
      if (end == targets.npos) return fail("targets must each end in a space");
      XLA_FFI_Handler* handler = find(targets.substr(0, end));
      if (handler == nullptr) return fail("targets must be known");
      targets.remove_prefix(end + 1);
      if (XLA_FFI_Error* error = run_call(handler, call)) return error;
    }
    return left_ == 0 ? nullptr : fail("words must be of the targets' calls");
  }

  XLA_FFI_Error* fail(const std::string& message) const {
    const std::string whole = "chain: " + message;
    XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, whole.c_str(),
                                      XLA_FFI_Error_Code_INVALID_ARGUMENT};
    return frame_.api->XLA_FFI_Error_Create(&args);
  }

 private:
  const XLA_FFI_CallFrame& frame_;
  int64_t* next_ = nullptr;  // words that have not been read
  size_t left_ = 0;
  std::deque<XLA_FFI_Buffer> results_;  // of all calls so far; they stay where they are

  // The next word; -1 past the last, which is none that may stand where this is asked for.
  int64_t take() { return left_ == 0 ? -1 : (--left_, *next_++); }

  // The next rank and dimensions.
  bool take_shape(XLA_FFI_Buffer* buffer) {
    const int64_t rank = take();
    if (rank < 0 || static_cast<size_t>(rank) > left_) return false;
    buffer->rank = rank, buffer->dims = next_;
    next_ += rank, left_ -= rank;
    return elements(*buffer) >= 0;
  }

  // -1 where there can be no such buffer.
  static int64_t elements(const XLA_FFI_Buffer& buffer) {
    int64_t n = 1;
    for (int64_t i = 0; i < buffer.rank; ++i) {
      if (buffer.dims[i] < 0 || __builtin_mul_overflow(n, buffer.dims[i], &n)) return -1;
    }
    return n;
  }

  bool take_operand(XLA_FFI_Buffer* operand) {
    const int64_t index = take(), args = frame_.args.size;
    if (index < 0 || index >= args + static_cast<int64_t>(results_.size())) return false;
    const auto& whole = index < args ? *static_cast<const XLA_FFI_Buffer*>(frame_.args.args[index])
                                     : results_[index - args];
    *operand = whole;
    return take_shape(operand) && elements(*operand) == elements(whole);
  }

  static int64_t bytes(const XLA_FFI_Buffer& buffer) {
    return elements(buffer) * xla::ffi::ByteWidth(static_cast<xla::ffi::DataType>(buffer.dtype));
  }

  bool take_result(XLA_FFI_Buffer* result) {
    const int64_t place = take(), type = take(), last = frame_.rets.size - 1;
    if (last < 0 || place >= last) return false;
    const auto& whole =
        *static_cast<const XLA_FFI_Buffer*>(frame_.rets.rets[place < 0 ? last : place]);
    const int64_t begin = place < 0 ? -1 - place : 0;
    *result = whole;
    result->data = static_cast<char*>(whole.data) + begin;
    result->dtype = static_cast<XLA_FFI_DataType>(type);
    return take_shape(result) && begin + bytes(*result) <= bytes(whole);
  }

  std::string_view name_of(int64_t i) const {
    return {frame_.attrs.names[i]->ptr, frame_.attrs.names[i]->len};
  }

  static XLA_FFI_Handler* find(std::string_view target) {
    for (const Registration& entry : registrations()) {
      if (entry.target == target) return entry.handler;
    }
    return nullptr;
  }

  XLA_FFI_Error* run_call(XLA_FFI_Handler* handler, int call) {
    std::deque<XLA_FFI_Buffer> operands;
    std::vector<void*> args, rets;
    for (int64_t left = take(); left > 0; --left) {
      if (!take_operand(&operands.emplace_back())) return fail("words must name operands");
      args.push_back(&operands.back());
    }
    for (int64_t left = take(); left > 0; --left) {
      if (!take_result(&results_.emplace_back())) return fail("words must place results");
      rets.push_back(&results_.back());
    }
    const std::string prefix = std::to_string(call) + ".";
    std::deque<XLA_FFI_ByteSpan> spans;
    std::vector<XLA_FFI_ByteSpan*> names;
    std::vector<XLA_FFI_AttrType> attr_types;
    std::vector<void*> attrs;
    for (int64_t i = 0; i < frame_.attrs.size; ++i) {
      std::string_view name = name_of(i);
      if (!name.starts_with(prefix)) continue;
      name.remove_prefix(prefix.size());
      names.push_back(&spans.emplace_back(XLA_FFI_ByteSpan{name.data(), name.size()}));
      attr_types.push_back(frame_.attrs.types[i]);
      attrs.push_back(frame_.attrs.attrs[i]);
    }
    std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
    std::vector<XLA_FFI_RetType> ret_types(rets.size(), XLA_FFI_RetType_BUFFER);
    XLA_FFI_CallFrame frame = frame_;
    frame.args.size = args.size();
    frame.args.types = arg_types.data();
    frame.args.args = args.data();
    frame.rets.size = rets.size();
    frame.rets.types = ret_types.data();
    frame.rets.rets = rets.data();
    frame.attrs.size = attrs.size();
    frame.attrs.types = attr_types.data();
    frame.attrs.names = names.data();
    frame.attrs.attrs = attrs.data();
    const Chained chained(/*follows=*/call > 0);
    return handler(&frame);
  }
};

// What XLA asks of a handler before it calls it, any operation's answers.
inline XLA_FFI_Error* run_chain(XLA_FFI_CallFrame* frame) {
  const auto* extension = frame->extension_start;
  if (extension != nullptr && extension->type == XLA_FFI_Extension_Metadata) {
    const auto other = [](const Registration& entry) { return entry.handler != run_chain; };
    return std::ranges::find_if(registrations(), other)->handler(frame);
  }
  Chain chain(*frame);
  try {
    return chain.run();
  } catch (const std::exception& exception) {
    return chain.fail(exception.what());
  }
}

inline const bool chain_added = add_registration("flashmla_chain_v1", run_chain);

}  // namespace flashmla::ffi
