// A torch device with memory of its own, on any machine: what tests of `hermes.device` run on without a GPU.
//
// Its tensors are real to torch: mixing them with the CPU's is refused, and every operation on them is dispatched,
// to the CPU's kernels. Copies on a stream other than the default one are carried out later, by a thread, as a copy
// engine does it: whoever looks at the target, or writes over the source, without waiting for them is found out.

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

namespace {

constexpr auto DEVICE = c10::DeviceType::PrivateUse1;
constexpr auto COPY_DELAY = std::chrono::milliseconds(2);

// ---------------------------------------------------------------- memory

std::atomic<int64_t> allocated{0}, peak{0};
constexpr size_t HEADER = 64;

void release(void* data) {
  if (data == nullptr) return;
  char* block = static_cast<char*>(data) - HEADER;
  allocated -= static_cast<int64_t>(*reinterpret_cast<size_t*>(block));
  std::free(block);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    if (nbytes == 0) return {nullptr, nullptr, &release, c10::Device(DEVICE, 0)};
    char* block = static_cast<char*>(std::aligned_alloc(HEADER, (nbytes + 2 * HEADER - 1) / HEADER * HEADER));
    *reinterpret_cast<size_t*>(block) = nbytes;
    const int64_t now = allocated += static_cast<int64_t>(nbytes);
    if (now > peak) peak = now;
    return {block + HEADER, block + HEADER, &release, c10::Device(DEVICE, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, size_t nbytes) const override {
    std::memcpy(target, source, nbytes);
  }
};
Allocator allocator;
REGISTER_ALLOCATOR(DEVICE, &allocator);

// ---------------------------------------------------------------- streams

struct Mark {
  std::mutex mutex;
  std::condition_variable changed;
  bool passed = false;
  void pass() {
    { std::lock_guard lock(mutex); passed = true; }
    changed.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [this] { return passed; });
  }
};
using Event = std::shared_ptr<Mark>;

class Queue {  // never destroyed: its thread may outlive static destructors
 public:
  Queue() { std::thread([this] { run(); }).detach(); }
  void add(std::function<void()> task) {
    { std::lock_guard lock(mutex_); tasks_.push_back(std::move(task)); }
    changed_.notify_one();
  }

 private:
  void run() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return !tasks_.empty(); });
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
};

std::mutex queues_mutex;
std::map<c10::StreamId, Queue*>& queues() {
  static auto* all = new std::map<c10::StreamId, Queue*>;
  return *all;
}
thread_local c10::StreamId current_stream = 0;

Queue* queue_of(c10::StreamId stream) {  // null: the default stream, on which everything is done at once
  if (stream == 0) return nullptr;
  std::lock_guard lock(queues_mutex);
  return queues().at(stream);
}

Event record_on(c10::StreamId stream) {
  auto mark = std::make_shared<Mark>();
  if (Queue* queue = queue_of(stream)) queue->add([mark] { mark->pass(); });
  else mark->pass();
  return mark;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return DEVICE; }
  c10::Device exchangeDevice(c10::Device) const override { return {DEVICE, 0}; }
  c10::Device getDevice() const override { return {DEVICE, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream stream(c10::StreamId id) const {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(DEVICE, 0), id);
  }
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    std::lock_guard lock(queues_mutex);
    const c10::StreamId id = static_cast<c10::StreamId>(queues().size()) + 1;
    queues()[id] = new Queue;
    return stream(id);
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const auto before = current_stream;
    current_stream = next.id();
    return stream(before);
  }
  void synchronizeStream(const c10::Stream& stream) const override { record_on(stream.id())->wait(); }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    std::vector<c10::StreamId> all;
    {
      std::lock_guard lock(queues_mutex);
      for (const auto& entry : queues()) all.push_back(entry.first);
    }
    for (const auto id : all) record_on(id)->wait();
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    *static_cast<Event*>(*event) = record_on(stream.id());
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event == nullptr) return;
    Event mark = *static_cast<Event*>(event);
    if (Queue* queue = queue_of(stream.id())) queue->add([mark] { mark->wait(); });
    else mark->wait();
  }
  bool queryEvent(void* event) const override {
    if (event == nullptr) return true;
    Event mark = *static_cast<Event*>(event);
    std::lock_guard lock(mark->mutex);
    return mark->passed;
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) Event(*static_cast<Event*>(event))->wait();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    c10::DataPtr fresh = allocator.allocate(nbytes);
    if (storage.nbytes() && nbytes) std::memcpy(fresh.get(), storage.data(), std::min(storage.nbytes(), nbytes));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(nbytes);
  }
};
const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

// ---------------------------------------------------------------- operations

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor as_cpu(const at::Tensor& tensor) {  // the same bytes
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  if (!target.numel()) return target;
  at::Tensor from = as_cpu(source), to = as_cpu(target);
  Queue* queue = queue_of(current_stream);
  if (queue == nullptr) {
    to.copy_(from);
  } else {
    // Storages are not kept alive: memory that is given back too early is what a test wants to see.
    queue->add([from, to] {
      std::this_thread::sleep_for(COPY_DELAY);
      to.copy_(from);
    });
    if (!non_blocking) record_on(current_stream)->wait();
  }
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  at::native::resize_(target, source.sizes(), std::nullopt);
  return copy_from(source, target, false);
}

at::Scalar local_scalar(const at::Tensor& tensor) { return as_cpu(tensor).item(); }

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  return at::cpu::set__symint(self, storage, offset, size, stride);
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                       bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  const std::optional<at::Tensor> added = bias && bias->defined() ? std::optional(as_cpu(*bias)) : std::nullopt;
  return at::convolution_symint(as_cpu(input), as_cpu(weight), added, stride, padding, dilation, transposed,
                                output_padding, groups)
      .to(input.device());
}

at::Tensor histc(const at::Tensor& values, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  return at::histc(as_cpu(values).to(at::kFloat), bins, low, high).to(values.dtype()).to(values.device());
}

int64_t choose_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                         double, bool, std::optional<double>, bool) {
  return static_cast<int64_t>(sdp::SDPBackend::math);
}

// As on a GPU: tensors of the host's are refused, but for single numbers.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  bool here = false, elsewhere = false;
  const auto look = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    here |= tensor.device().type() == DEVICE;
    elsewhere |= tensor.device().is_cpu() && tensor.dim() > 0;
  };
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) look(value.toTensor());
    if (value.isTensorList())
      for (const at::Tensor& tensor : value.toTensorVector()) look(tensor);
  }
  TORCH_CHECK(!(here && elsewhere), op.schema().name(), ": tensors on the CPU and on the second device");
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("resize_", TORCH_FN(at::native::resize_));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("_local_scalar_dense", TORCH_FN(local_scalar));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("histc", TORCH_FN(histc));  // which the CPU's lacks for whole numbers, and a GPU's has
  m.impl("convolution_overrideable", TORCH_FN(convolution));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
}

TORCH_LIBRARY(second_device, m) {
  m.def("allocated_bytes() -> int", [] { return allocated.load(); });
  m.def("peak_bytes() -> int", [] { return peak.load(); });
  m.def("reset_peak() -> ()", [] { peak = allocated.load(); });
  m.def("view(int address, int nbytes) -> Tensor", [](int64_t address, int64_t nbytes) {
    const c10::Device device(DEVICE, 0);
    c10::DataPtr data(reinterpret_cast<void*>(address), device);
    at::Tensor bytes = at::detail::empty_generic({0}, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                                 at::kByte, std::nullopt);
    c10::Storage storage(c10::Storage::use_byte_size_t(), nbytes, std::move(data), nullptr, false);
    at::cpu::set_(bytes, storage, 0, {nbytes}, {1});
    return bytes;
  });
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &choose_attention);
}
