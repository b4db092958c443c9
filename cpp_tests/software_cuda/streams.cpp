// The runtime's streams, events and graphs.
#include <algorithm>

#include "runtime.hpp"

using namespace software_cuda;

namespace {

template <class T>
T* keep(Owned<T>& owned, std::unique_ptr<T> made) {
  T* handle = made.get();
  owned[handle] = std::move(made);
  return handle;
}

// The origin's stream goes on alone.
void end(const std::shared_ptr<Capture>& capture) {
  for (cudaStream_t stream : capture->streams) {
    stream->capture = nullptr;
    stream->captured_last.clear();
  }
  auto& all = state().captures;
  all.erase(std::remove(all.begin(), all.end(), capture), all.end());
}

// Whether everything that the streams did is before the origin's last node.
bool joined(const Capture& capture) {
  std::set<size_t> before;
  std::vector<size_t> left = capture.origin->captured_last;
  while (!left.empty()) {
    const size_t node = left.back();
    left.pop_back();
    if (!before.insert(node).second) continue;
    left.insert(left.end(), capture.nodes[node].needs.begin(), capture.nodes[node].needs.end());
  }
  for (cudaStream_t stream : capture.streams)
    for (size_t node : stream->captured_last)
      if (before.count(node) == 0) return false;
  return true;
}

void wait(Context& context, cudaStream_t stream, const CUevent_st& event) {
  if (event.capture != nullptr) {
    const auto& all = state().captures;
    if (std::find(all.begin(), all.end(), event.capture) == all.end())
      refuse(cudaErrorCapturedEvent, "the event was last recorded in a capture that has ended");
    if (stream->legacy) {
      invalidate(*event.capture);
      refuse(cudaErrorStreamCaptureImplicit, "the legacy default stream waits for a captured event");
    }
    if (stream->capture == nullptr) {
      stream->capture = event.capture;
      event.capture->streams.insert(stream);
    } else if (stream->capture != event.capture) {
      invalidate(*stream->capture);
      invalidate(*event.capture);
      refuse(cudaErrorStreamCaptureMerge, "the stream and the event are of two captures");
    }
    for (size_t node : event.captured) stream->captured_last.push_back(node);
    return;
  }
  if (stream->capture != nullptr) {
    invalidate(*stream->capture);
    refuse(cudaErrorStreamCaptureIsolation, "a stream that captures waits for an event of one that does not");
  }
  if (event.recorded != nullptr) context.enqueue(stream, "cudaStreamWaitEvent", [](Context&) {}, {event.recorded});
}

}  // namespace

extern "C" {

int cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return runtime("cudaStreamCreateWithFlags", cudaErrorMemoryAllocation, [&] {
    Context& context = runtime_context();
    if (flags > cudaStreamNonBlocking) refuse(cudaErrorInvalidValue, "flags " + std::to_string(flags));
    *stream = keep(context.streams, std::make_unique<CUstream_st>(CUstream_st{
                                        &context, false, flags == cudaStreamDefault, nullptr, nullptr, {}}));
  });
}

int cudaStreamDestroy(cudaStream_t handle) {
  return runtime("cudaStreamDestroy", cudaErrorUnknown, [&] {
    Context& context = runtime_context();
    const cudaStream_t stream = find_stream(context, handle);
    if (stream->legacy) refuse(cudaErrorInvalidResourceHandle, "the default stream");
    if (stream->capture != nullptr) {
      invalidate(*stream->capture);
      const auto capture = stream->capture;
      if (capture->origin == stream)
        end(capture);
      else
        capture->streams.erase(stream);
    }
    context.streams.erase(stream);
  });
}

int cudaStreamSynchronize(cudaStream_t handle) {
  return runtime("cudaStreamSynchronize", cudaErrorLaunchFailure, [&] {
    Context& context = runtime_context();
    const cudaStream_t stream = find_stream(context, handle);
    forbid_waiting(stream, "cudaStreamSynchronize");
    context.settle(context.last_of(stream));
    context.check();
  });
}

int cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags) {
  return runtime("cudaStreamWaitEvent", cudaErrorUnknown, [&] {
    Context& context = runtime_context();
    const cudaStream_t stream = find_stream(context, handle);
    if (flags != 0) refuse(cudaErrorInvalidValue, "flags " + std::to_string(flags));
    wait(context, stream, find_in(context.events, event, "event"));
  });
}

int cudaStreamIsCapturing(cudaStream_t handle, int* status) {
  return runtime("cudaStreamIsCapturing", cudaErrorUnknown, [&] {
    Context& context = runtime_context();
    const cudaStream_t stream = find_stream(context, handle);
    if (stream->legacy)
      for (const auto& capture : state().captures)
        for (cudaStream_t other : capture->streams)
          if (capture->context == &context && other->blocking)
            refuse(cudaErrorStreamCaptureImplicit, "the legacy default stream while a blocking stream captures");
    *status = stream->capture == nullptr  ? cudaStreamCaptureStatusNone
              : !stream->capture->invalid ? cudaStreamCaptureStatusActive
                                          : cudaStreamCaptureStatusInvalidated;
  });
}

int cudaStreamBeginCapture(cudaStream_t handle, int mode) {
  return runtime("cudaStreamBeginCapture", cudaErrorUnknown, [&] {
    Context& context = runtime_context();
    const cudaStream_t stream = find_stream(context, handle);
    if (mode < cudaStreamCaptureModeGlobal || mode > cudaStreamCaptureModeRelaxed)
      refuse(cudaErrorInvalidValue, "mode " + std::to_string(mode));
    if (stream->legacy) refuse(cudaErrorStreamCaptureUnsupported, "of the legacy default stream");
    if (stream->capture != nullptr) refuse(cudaErrorIllegalState, "the stream captures already");
    stream->capture = std::make_shared<Capture>();
    Capture& capture = *stream->capture;
    capture.origin = stream;
    capture.thread = std::this_thread::get_id();
    capture.mode = mode;
    capture.context = &context;
    capture.streams = {stream};
    state().captures.push_back(stream->capture);
  });
}

int cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  return runtime("cudaStreamEndCapture", cudaErrorUnknown, [&] {
    Context& context = runtime_context();
    const cudaStream_t stream = find_stream(context, handle);
    *graph = nullptr;
    const std::shared_ptr<Capture> capture = stream->capture;
    if (capture == nullptr) refuse(cudaErrorIllegalState, "the stream does not capture");
    if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
      refuse(cudaErrorStreamCaptureWrongThread, "another thread began");
    if (capture->origin != stream) {
      invalidate(*capture);
      refuse(cudaErrorStreamCaptureUnmatched, "the capture began in another stream");
    }
    const bool all = joined(*capture), invalid = capture->invalid;
    end(capture);
    if (invalid) refuse(cudaErrorStreamCaptureInvalidated, "the capture was invalidated");
    if (!all) refuse(cudaErrorStreamCaptureUnjoined, "a stream that joined the capture was not waited for");
    *graph = keep(context.graphs, std::make_unique<CUgraph_st>(CUgraph_st{&context, capture->nodes}));
  });
}

int cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return runtime("cudaEventCreateWithFlags", cudaErrorMemoryAllocation, [&] {
    Context& context = runtime_context();
    if (flags > 7) refuse(cudaErrorInvalidValue, "flags " + std::to_string(flags));
    *event = keep(context.events, std::make_unique<CUevent_st>(CUevent_st{&context, nullptr, nullptr, {}}));
  });
}

int cudaEventDestroy(cudaEvent_t event) {
  return runtime("cudaEventDestroy", cudaErrorUnknown, [&] {
    Context& context = runtime_context();
    find_in(context.events, event, "event");
    context.events.erase(event);
  });
}

int cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  return runtime("cudaEventRecord", cudaErrorUnknown, [&] {
    Context& context = runtime_context();
    const cudaStream_t stream = find_stream(context, stream_handle);
    CUevent_st& event = find_in(context.events, handle, "event");
    if (stream->capture != nullptr) {
      if (stream->capture->invalid) refuse(cudaErrorStreamCaptureInvalidated, "the stream's capture was invalidated");
      event.capture = stream->capture;
      event.captured = stream->captured_last;
      return;
    }
    event.recorded = context.enqueue(stream, "cudaEventRecord", [](Context&) {});
    event.capture = nullptr;
  });
}

int cudaEventSynchronize(cudaEvent_t handle) {
  return runtime("cudaEventSynchronize", cudaErrorLaunchFailure, [&] {
    Context& context = runtime_context();
    const CUevent_st& event = find_in(context.events, handle, "event");
    if (event.capture != nullptr) {
      invalidate(*event.capture);
      refuse(cudaErrorCapturedEvent, "the event was recorded in a capture");
    }
    context.settle({event.recorded});
    context.check();
  });
}

int cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t handle, unsigned long long flags) {
  return runtime("cudaGraphInstantiateWithFlags", cudaErrorMemoryAllocation, [&] {
    Context& context = runtime_context();
    if (flags != 0) refuse(cudaErrorNotSupported, "flags are not modelled");
    const CUgraph_st& graph = find_in(context.graphs, handle, "graph");
    *exec = keep(context.execs, std::make_unique<CUgraphExec_st>(CUgraphExec_st{&context, graph.nodes, nullptr}));
  });
}

int cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t stream_handle) {
  return runtime("cudaGraphLaunch", cudaErrorUnknown, [&] {
    Context& context = runtime_context();
    const cudaStream_t stream = find_stream(context, stream_handle);
    CUgraphExec_st& exec = find_in(context.execs, handle, "executable graph");
    if (stream->capture != nullptr) {
      invalidate(*stream->capture);
      refuse(cudaErrorStreamCaptureUnsupported, "graphs within graphs are not modelled");
    }
    context.launch(stream, exec);
  });
}

int cudaGraphDestroy(cudaGraph_t graph) {
  return runtime("cudaGraphDestroy", cudaErrorUnknown, [&] {
    Context& context = runtime_context();
    find_in(context.graphs, graph, "graph");
    context.graphs.erase(graph);
  });
}

int cudaGraphExecDestroy(cudaGraphExec_t exec) {
  return runtime("cudaGraphExecDestroy", cudaErrorUnknown, [&] {
    Context& context = runtime_context();
    find_in(context.execs, exec, "executable graph");
    context.execs.erase(exec);
  });
}
}
