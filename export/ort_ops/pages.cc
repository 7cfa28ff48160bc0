#include "pages.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace moedge {
namespace {

constexpr size_t LEAST_BYTES = 1 << 16;  // of an input: fewer lie in few pages anyway
constexpr size_t LARGE_PAGE = size_t{2} << 20;
constexpr size_t CHUNK = 32 * LARGE_PAGE;  // of addresses; memory is taken as it is written
constexpr size_t RESERVE = size_t{256} << 20;  // what is left to others: below, weights stay in their file
constexpr size_t PIECE = 8 * LARGE_PAGE;  // of a weight that is in memory twice while it is copied
constexpr size_t ALIGNMENT = 4096;         // as in a mapped file, so that rows fall on the same places of a cache

size_t bytes_of(int type, const std::vector<int64_t>& dims) {
  size_t bytes = type == FLOAT32 ? 4 : type == FLOAT16 ? 2 : type == UINT8 ? 1 : 0;
  for (int64_t dim : dims) bytes *= static_cast<size_t>(dim);
  return bytes;
}

#if defined(__linux__)

std::string setting(const char* name) {
  std::ifstream file(std::string("/sys/kernel/mm/transparent_hugepage/") + name);
  std::string line;
  std::getline(file, line);
  return line;
}

// Whether the system gives pages of 2 MiB to who asks. (With a base of 64 KiB on Arm the larger ones have 512 MiB.)
bool gives_large_pages() {
  const std::string enabled = setting("enabled");
  return !enabled.empty() && enabled.find("[never]") == std::string::npos &&
         setting("hpage_pmd_size") == std::to_string(LARGE_PAGE);
}

// Bytes that can be had without swapping; what the cache of files holds counts too.
size_t available() {
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    unsigned long long kib = 0;
    if (std::sscanf(line.c_str(), "MemAvailable: %llu", &kib) == 1) return static_cast<size_t>(kib) << 10;
  }
  return 0;
}

// Whether all of it lies in one mapping of a file of which this process sees changes of its own alone.
bool is_mapped_file(uintptr_t begin, uintptr_t end) {
  std::ifstream maps("/proc/self/maps");  // 7f00-7f10 rw-p 00000000 fe:00 1234   /path
  for (std::string line; std::getline(maps, line);) {
    unsigned long long first = 0, last = 0, inode = 0;
    char mode[5] = "";
    if (std::sscanf(line.c_str(), "%llx-%llx %4s %*x %*x:%*x %llu", &first, &last, mode, &inode) != 4) continue;
    if (begin >= first && begin < last) return end <= last && mode[3] == 'p' && inode != 0;
  }
  return false;
}

// Lets go of the pages of a file that were copied, so that weights are in memory once. Who reads them after all, as the
// rows of an embedding that is tied to the output, gets them from the file again. Memory that is no file's would be lost.
void give_back(const char* data, size_t bytes) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), at = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (at + page - 1) / page * page, end = (at + bytes) / page * page;
  if (begin < end && is_mapped_file(begin, end))
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

// Addresses of which copies take one part after the other; unmapped with the last of them.
class Chunk {
 public:
  explicit Chunk(size_t bytes) : size_(bytes + LARGE_PAGE) {
    memory_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory_);
    next_ = static_cast<char*>(memory_) + (LARGE_PAGE - at % LARGE_PAGE) % LARGE_PAGE;
    end_ = next_ + bytes;
    madvise(next_, bytes, MADV_HUGEPAGE);  // refused: pages are small, and all else is the same
  }
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;
  ~Chunk() { munmap(memory_, size_); }

  // Null where less is left.
  char* take(size_t bytes) {
    if (bytes > static_cast<size_t>(end_ - next_)) return nullptr;
    return std::exchange(next_, next_ + bytes);
  }

 private:
  void* memory_;
  size_t size_;
  char *next_, *end_;
};

// What all sessions share: the chunk that is being filled, and which copies there are.
struct Shared {
  std::mutex mutex;
  std::weak_ptr<Chunk> chunk;
  std::map<std::pair<const void*, size_t>, std::weak_ptr<char>> copies;

  // Null where memory is short.
  std::shared_ptr<char> copied(const char* from, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto entry = copies.begin(); entry != copies.end();)
      entry = entry->second.expired() ? copies.erase(entry) : std::next(entry);
    std::weak_ptr<char>& known = copies[{from, bytes}];
    std::shared_ptr<char> copy = known.lock();
    // Nodes that read one weight have one copy. Of a session that is just being closed the weights may be gone.
    if (copy && std::memcmp(copy.get(), from, bytes) == 0) {
      give_back(from, bytes);  // that it is the same was read there
      return copy;
    }
    if (available() < bytes + RESERVE) return nullptr;
    known = copy = taken((bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    for (size_t at = 0; copy && at < bytes; at += PIECE) {
      const size_t size = std::min(PIECE, bytes - at);
      std::memcpy(copy.get() + at, from + at, size);
      give_back(from + at, size);
    }
    return copy;
  }

 private:
  std::shared_ptr<char> taken(size_t room) {
    std::shared_ptr<Chunk> from = chunk.lock();
    char* at = from ? from->take(room) : nullptr;
    if (!at) {
      try {
        from = std::make_shared<Chunk>(std::max(CHUNK, (room + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE));
      } catch (const std::bad_alloc&) {  // addresses may be limited: ulimit -v, no overcommitment
        return nullptr;
      }
      at = from->take(room);
      chunk = from;
    }
    return {from, at};
  }
};

std::shared_ptr<char> copied(const char* from, size_t bytes) {
  static Shared* shared = new Shared;  // never released: sessions may end after it would be
  return shared->copied(from, bytes);
}

#else

bool gives_large_pages() { return false; }
std::shared_ptr<char> copied(const char*, size_t) { return nullptr; }

#endif

}  // namespace

bool large_pages() {
  static const bool wanted = [] {
    const char* name = std::getenv("MOEDGE_CPU_PAGES");
    const std::string given = name ? name : "large";
    if (given != "large" && given != "mapped")
      throw Invalid("MOEDGE_CPU_PAGES is '" + given + "'; it has to be large (the default) or mapped.");
    return given == "large" && gives_large_pages();
  }();
  return wanted;
}

Copies::Copies(const Api& api, const OrtKernelInfo* info, const int* types, size_t inputs) {
  if (!large_pages()) return;
  for (size_t i = 0; i < inputs; ++i) {
    const OrtValue* value = types[i] == ANY ? api.constant(info, i) : nullptr;
    if (!value) continue;
    std::vector<int64_t> dims;
    const size_t bytes = bytes_of(api.shape(value, dims), dims);
    const char* data = static_cast<const char*>(api.data(value));
    if (bytes < LEAST_BYTES) continue;
    if (std::shared_ptr<char> copy = copied(data, bytes)) copies_.emplace_back(data, std::move(copy));
  }
}

}  // namespace moedge
