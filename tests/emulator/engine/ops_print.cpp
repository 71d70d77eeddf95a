// printf of the device: what a kernel prints is kept for the launch's caller.
#include <algorithm>

#include "lanes.h"

namespace emu {
namespace {

constexpr size_t kMaxPrinted = 1 << 16;

std::string read_string(Warp& warp, u32 l, u64 address) {
  std::string text;
  for (char c; read_generic(warp, l, address++, &c, 1), c;) text += c;
  return text;
}

// A call's values lie one behind the other, each aligned to its own size.
struct Values {
  Warp& warp;
  u32 lane;
  u64 address;
  u32 taken = 0;

  u64 take(u32 bytes) {
    address = round_up(address, bytes);
    u64 value = 0;
    read_generic(warp, lane, address, reinterpret_cast<char*>(&value), bytes);
    address += bytes;
    taken++;
    return value;
  }
};

std::string formatted(const std::string& specification, Values& values) {
  const char conversion = specification.back();
  const bool wide = specification.find_first_of("ljz") != std::string::npos;
  std::string plain;
  std::copy_if(specification.begin(), specification.end() - 1, std::back_inserter(plain),
               [](char c) { return !strchr("hljzL", c); });
  char text[256];
  if (strchr("di", conversion)) {
    const u64 value = values.take(wide ? 8 : 4);
    snprintf(text, sizeof text, (plain + "lld").c_str(), wide ? i64(value) : i64(i32(value)));
  } else if (strchr("uoxX", conversion)) {
    snprintf(text, sizeof text, (plain + "ll" + conversion).c_str(), values.take(wide ? 8 : 4));
  } else if (strchr("eEfFgGaA", conversion)) {
    snprintf(text, sizeof text, (plain + conversion).c_str(), std::bit_cast<double>(values.take(8)));
  } else if (conversion == 'c') {
    snprintf(text, sizeof text, (plain + "c").c_str(), int(values.take(4)));
  } else if (conversion == 'p') {
    snprintf(text, sizeof text, "0x%llx", values.take(8));
  } else if (conversion == 's') {
    snprintf(text, sizeof text, (plain + "s").c_str(), read_string(values.warp, values.lane, values.take(8)).c_str());
  } else {
    fault(ErrorKind::kLaunch, "printf with the conversion %s", specification.c_str());
  }
  return text;
}

std::string print(Warp& warp, u32 l, const std::string& format, Values& values) {
  std::string text;
  for (size_t at = 0; at < format.size();) {
    const size_t percent = std::min(format.find('%', at), format.size());
    text.append(format, at, percent - at);
    if (percent == format.size()) break;
    const size_t end = format.find_first_not_of("-+ #0123456789.hljzL", percent + 1);
    if (end == std::string::npos) fault(ErrorKind::kLaunch, "printf of lane %u ends within a conversion: %s", l, format.c_str());
    text += format[end] == '%' ? "%" : formatted(format.substr(percent, end + 1 - percent), values);
    at = end + 1;
  }
  return text;
}

// vprintf(format, values) -> the number of values. Registers: where in .param space its two parameters lie, and its result.
void vprintf(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  for_lanes(mask, [&](u32 l) {
    u64 given[2];
    for (u32 i = 0; i < 2; i++) read_generic(warp, l, warp.get(in.reg[i], l), reinterpret_cast<char*>(&given[i]), 8);
    Values values{warp, l, given[1]};
    engine.printed += print(warp, l, read_string(warp, l, given[0]), values);
    if (engine.printed.size() > kMaxPrinted) engine.printed.erase(0, engine.printed.size() - kMaxPrinted);
    memcpy(local_memory(warp, l, warp.get(in.reg[2], l) & ~kLocalWindow, 4), &values.taken, 4);
  });
  engine.lane = -1;
  engine.progress++;
  warp.actions++;
}

}  // namespace

void add_print_ops(OpTable& t) { t.add("vprintf", vprintf); }

}  // namespace emu
