// Streams, events, capturing and graphs: the part of the CUDA runtime that orders work.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <unordered_set>

#include "device.h"

using namespace emulated;

namespace emulated {

std::recursive_mutex lock;
cudaError_t failure = cudaSuccess;

struct Event {
  int device;
  Work work;
  std::shared_ptr<Capture> capture;
  std::shared_ptr<double> milliseconds;
};

static std::set<Stream*> streams;  // without the default ones
static std::set<Event*> events;
static uint64_t given;  // pieces of work so far
constexpr size_t LONGEST_QUEUE = 1000;
static size_t waiting;

static Stream* default_stream(int device) {
  static Stream* all = [] {
    Stream* made = new Stream[DEVICES];
    for (int i = 0; i < DEVICES; ++i) made[i].device = i, made[i].legacy = true;
    return made;
  }();
  return all + device;
}

Stream* stream_of(void* handle) {
  if (handle == nullptr || handle == cudaStreamLegacy) return default_stream(current_device);
  auto found = streams.find(static_cast<Stream*>(handle));
  return found == streams.end() ? nullptr : *found;
}

void fail(cudaError_t error, const char* why) {
  fprintf(stderr, "emulated GPU: %s\n", why);
  if (!failure) failure = error;
}

static bool waits_for_default(const Stream* stream) {
  return !(stream->flags & cudaStreamNonBlocking);
}

template <class F>
static void for_each_stream(int device, F use) {
  use(default_stream(device));
  for (Stream* stream : streams)
    if (stream->device == device) use(stream);
}

static Work work(std::function<void()> run, std::vector<Work> needs) {
  auto made = std::make_shared<Op>();
  made->number = ++given;
  made->run = std::move(run);
  for (Work& need : needs)
    if (need && !need->done) made->needs.push_back(std::move(need));
  return made;
}

// The work that `last` needs and that is not done yet, itself included, in order.
static std::vector<Work> behind(const Work& last) {
  std::vector<Work> found, open;
  std::unordered_set<Op*> seen;
  if (last && !last->done) open.push_back(last);
  while (!open.empty()) {
    Work next = open.back();
    open.pop_back();
    if (!seen.insert(next.get()).second) continue;
    found.push_back(next);
    for (const Work& need : next->needs)
      if (!need->done) open.push_back(need);
  }
  std::sort(found.begin(), found.end(),
            [](const Work& a, const Work& b) { return a->number < b->number; });
  return found;
}

cudaError_t finish(const Work& last) {
  for (const Work& next : behind(last)) {
    if (!failure) next->run();
    next->done = true;
    next->run = nullptr;
    next->needs.clear();
    --waiting;
  }
  return failure;
}

cudaError_t finish_device(int device) {
  for_each_stream(device, [](Stream* stream) {
    if (!stream->capture) finish(stream->last);
  });
  return failure;
}

static cudaError_t spoil(Capture& capture, cudaError_t error) {
  capture.failed = true;
  return error;
}

static cudaError_t enqueue(Stream* stream, std::function<void()> run, const Work& before) {
  if (failure) return failure;
  if (stream->capture) {
    if (stream->capture->failed) return cudaErrorStreamCaptureInvalidated;
    stream->last = work(std::move(run), {stream->last, before});
    stream->capture->nodes.push_back(stream->last);
    return cudaSuccess;
  }
  std::vector<Work> needs = {stream->last, before};
  if (stream->legacy) {
    cudaError_t error = cudaSuccess;
    for_each_stream(stream->device, [&](Stream* other) {
      if (!waits_for_default(other)) return;
      if (other->capture) error = spoil(*other->capture, cudaErrorStreamCaptureImplicit);
      needs.push_back(other->last);
    });
    if (error) return error;
  } else if (waits_for_default(stream)) {
    needs.push_back(default_stream(stream->device)->last);
  }
  stream->last = work(std::move(run), std::move(needs));
  static const bool blocking = getenv("CUDA_LAUNCH_BLOCKING");
  return ++waiting > LONGEST_QUEUE || blocking ? finish(stream->last) : cudaSuccess;
}

cudaError_t enqueue(Stream* stream, std::function<void()> run) {
  return enqueue(stream, std::move(run), nullptr);
}

cudaError_t may_allocate() {
  for (Stream* stream : streams)
    if (stream->capture && stream->capture->mode != cudaStreamCaptureModeRelaxed)
      return spoil(*stream->capture, cudaErrorStreamCaptureUnsupported);
  return cudaSuccess;
}

static cudaError_t create(cudaStream_t* result, unsigned flags, int priority) {
  Guard guard(lock);
  Stream* made = new Stream;
  made->device = current_device;
  made->flags = flags;
  made->priority = priority;
  streams.insert(made);
  *result = reinterpret_cast<cudaStream_t>(made);
  return cudaSuccess;
}

static Event* event_of(cudaEvent_t handle) {
  auto found = events.find(reinterpret_cast<Event*>(handle));
  return found == events.end() ? nullptr : *found;
}

}  // namespace emulated

extern "C" {

// --- streams -------------------------------------------------------------------------------------

cudaError_t cudaStreamCreate(cudaStream_t* result) { return create(result, 0, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* result, unsigned flags) {
  return create(result, flags, 0);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* result, unsigned flags, int priority) {
  return create(result, flags, priority);
}
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Guard guard(lock);
  Stream* stream = stream_of(handle);
  if (!stream || stream->legacy) return cudaErrorInvalidResourceHandle;
  finish(stream->capture ? nullptr : stream->last);
  streams.erase(stream);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned* flags) {
  Guard guard(lock);
  Stream* stream = stream_of(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  *flags = stream->flags;
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  Guard guard(lock);
  Stream* stream = stream_of(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  *priority = stream->priority;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Guard guard(lock);
  Stream* stream = stream_of(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (stream->capture) return spoil(*stream->capture, cudaErrorStreamCaptureUnsupported);
  if (!stream->legacy) return finish(stream->last);
  cudaError_t error = enqueue(stream, [] {});  // behind the streams that the default one waits for
  return error ? error : finish(stream->last);
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Guard guard(lock);
  Stream* stream = stream_of(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (stream->capture) return spoil(*stream->capture, cudaErrorStreamCaptureUnsupported);
  return stream->last && !stream->last->done ? cudaErrorNotReady : failure;
}
cudaError_t cudaDeviceSynchronize() {
  Guard guard(lock);
  cudaError_t error = cudaSuccess;
  for_each_stream(current_device, [&](Stream* stream) {
    if (stream->capture) error = spoil(*stream->capture, cudaErrorStreamCaptureUnsupported);
  });
  return error ? error : finish_device(current_device);
}

// --- events --------------------------------------------------------------------------------------

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* result, unsigned) {
  Guard guard(lock);
  Event* made = new Event{current_device, nullptr, nullptr, nullptr};
  events.insert(made);
  *result = reinterpret_cast<cudaEvent_t>(made);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* result) { return cudaEventCreateWithFlags(result, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  Guard guard(lock);
  Event* event = event_of(handle);
  if (!event) return cudaErrorInvalidResourceHandle;
  events.erase(event);
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  Guard guard(lock);
  Event* event = event_of(handle);
  Stream* stream = stream_of(stream_handle);
  if (!event || !stream || event->device != stream->device) return cudaErrorInvalidResourceHandle;
  auto when = std::make_shared<double>(0);
  cudaError_t error = enqueue(stream, [when] {
    auto now = std::chrono::steady_clock::now().time_since_epoch();
    *when = std::chrono::duration<double, std::milli>(now).count();
  });
  if (error) return error;
  event->work = stream->last;
  event->capture = stream->capture;
  event->milliseconds = when;
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Guard guard(lock);
  Event* event = event_of(handle);
  if (!event) return cudaErrorInvalidResourceHandle;
  if (event->capture) return spoil(*event->capture, cudaErrorCapturedEvent);
  return event->work && !event->work->done ? cudaErrorNotReady : failure;
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Guard guard(lock);
  Event* event = event_of(handle);
  if (!event) return cudaErrorInvalidResourceHandle;
  if (event->capture) return spoil(*event->capture, cudaErrorCapturedEvent);
  return finish(event->work);
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  Guard guard(lock);
  Event *from = event_of(start), *to = event_of(end);
  if (!from || !to || !from->work || !to->work) return cudaErrorInvalidResourceHandle;
  if (!from->work->done || !to->work->done) return cudaErrorNotReady;
  *milliseconds = float(*to->milliseconds - *from->milliseconds);
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle, unsigned) {
  Guard guard(lock);
  Event* event = event_of(handle);
  Stream* stream = stream_of(stream_handle);
  if (!event || !stream) return cudaErrorInvalidResourceHandle;
  if (!event->work) return cudaSuccess;
  if (stream->capture != event->capture) {
    if (stream->capture) return spoil(*stream->capture, cudaErrorStreamCaptureIsolation);
    if (stream->legacy) return spoil(*event->capture, cudaErrorStreamCaptureImplicit);
    finish(stream->last);
    stream->capture = event->capture;  // it joins the capture
    stream->last = event->work;
    return cudaSuccess;
  }
  return enqueue(stream, [] {}, event->work);
}

// --- capturing -----------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Guard guard(lock);
  Stream* stream = stream_of(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (stream->legacy) return cudaErrorStreamCaptureUnsupported;
  if (stream->capture) return cudaErrorIllegalState;
  cudaError_t error = finish(stream->last);
  stream->last = nullptr;
  stream->capture = std::make_shared<Capture>(Capture{mode, stream, {}});
  return error;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Guard guard(lock);
  Stream* stream = stream_of(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (stream->legacy) {
    cudaError_t error = cudaSuccess;
    for_each_stream(stream->device, [&](Stream* other) {
      if (other->capture && waits_for_default(other)) error = cudaErrorStreamCaptureImplicit;
    });
    if (error) return error;
  }
  *status = !stream->capture           ? cudaStreamCaptureStatusNone
            : stream->capture->failed ? cudaStreamCaptureStatusInvalidated
                                      : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Guard guard(lock);
  Stream* stream = stream_of(handle);
  *graph = nullptr;
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (!stream->capture) return cudaErrorIllegalState;
  std::shared_ptr<Capture> capture = stream->capture;
  if (capture->origin != stream) return spoil(*capture, cudaErrorStreamCaptureUnmatched);
  bool joined = behind(stream->last).size() == capture->nodes.size();
  for (Stream* other : streams)
    if (other->capture == capture) other->capture = nullptr, other->last = nullptr;
  if (capture->failed) return cudaErrorStreamCaptureInvalidated;
  if (!joined) return cudaErrorStreamCaptureUnjoined;
  *graph = reinterpret_cast<cudaGraph_t>(new std::vector<Work>(capture->nodes));
  return cudaSuccess;
}

// --- graphs: lists of work -----------------------------------------------------------------------

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* result, cudaGraph_t graph, unsigned long long) {
  Guard guard(lock);
  auto* nodes = reinterpret_cast<std::vector<Work>*>(graph);
  *result = reinterpret_cast<cudaGraphExec_t>(
      new std::shared_ptr<std::vector<Work>>(std::make_shared<std::vector<Work>>(*nodes)));
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<std::vector<Work>*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<std::shared_ptr<std::vector<Work>>*>(executable);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  Guard guard(lock);
  Stream* stream = stream_of(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  auto nodes = *reinterpret_cast<std::shared_ptr<std::vector<Work>>*>(executable);
  return enqueue(stream, [nodes] {
    for (const Work& node : *nodes) node->run();
  });
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }

// --- errors --------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorIllegalState: return "cudaErrorIllegalState";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureUnjoined: return "cudaErrorStreamCaptureUnjoined";
    case cudaErrorStreamCaptureIsolation: return "cudaErrorStreamCaptureIsolation";
    case cudaErrorStreamCaptureImplicit: return "cudaErrorStreamCaptureImplicit";
    case cudaErrorCapturedEvent: return "cudaErrorCapturedEvent";
    default: return "cudaErrorOfAnotherKind";
  }
}
const char* cudaGetErrorString(cudaError_t) { return "said by the emulated GPU"; }

}  // extern "C"
