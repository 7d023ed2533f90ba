// NVRTC with g++: a kernel's text behind `prelude.h` becomes a library, whose path is the "cubin".
//
// Compiled with EMULATOR, the folder with the precompiled prelude and, below it, what is compiled.

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace {

enum Result { OK = 0, COMPILATION = 6, NO_NAME_EXPRESSION = 8 };

struct Program {
  std::string text, log, cubin;
  std::vector<std::string> expressions, names;
};

bool in_word(char c) { return isalnum(static_cast<unsigned char>(c)) || c == '_'; }

// The names of the kernels that are no templates.
std::vector<std::string> kernels(const std::string& text) {
  std::vector<std::string> found;
  const std::string mark = "__global__";
  for (size_t at = text.find(mark); at != text.npos; at = text.find(mark, at + 1)) {
    size_t statement = text.find_last_of(";}", at);
    if (statement == text.npos) statement = 0;
    if (text.substr(statement, at - statement).find("template") != text.npos) continue;
    at += mark.size();
    for (std::string word; at < text.size(); word.clear()) {
      while (at < text.size() && isspace(static_cast<unsigned char>(text[at]))) ++at;
      while (at < text.size() && in_word(text[at])) word += text[at++];
      if (word == "__launch_bounds__") {
        at = text.find(')', at) + 1;
      } else if (word != "void") {
        if (!word.empty()) found.push_back(word);
        break;
      }
    }
  }
  return found;
}

// `extern __shared__ T name[];` as a pointer to what the launch asks for.
std::string with_dynamic_shared(std::string text) {
  const std::string mark = "extern __shared__";
  for (size_t at = text.find(mark); at != text.npos; at = text.find(mark, at)) {
    size_t end = text.find("[]", at), start = end;
    if (end == text.npos) break;
    while (in_word(text[start - 1])) --start;
    std::string name = text.substr(start, end - start);
    std::string type = text.substr(at + mark.size(), start - at - mark.size());
    text.replace(at, end + 2 - at, type + "* " + name + " = (" + type + "*)SHIM_DYNAMIC_SHARED");
  }
  return text;
}

bool has_any(const std::string& text, std::initializer_list<const char*> words) {
  for (const char* word : words)
    if (text.find(word) != text.npos) return true;
  return false;
}

uint64_t hash(const std::string& text, uint64_t seed) {
  for (unsigned char c : text) seed = (seed ^ c) * 0x100000001B3;
  return seed;
}

std::string read(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

int compile(Program& program, const std::string& flags, bool flush) {
  // A thread that waits needs a stack of its own; most kernels' threads do not wait.
  bool waits = has_any(program.text, {"__sync", "__shfl", "__nanosleep", "_sync("});
  std::ostringstream whole;
  whole << with_dynamic_shared(program.text) << "\nextern \"C\" const int emulated_flushes = "
        << flush << ";\n";
  for (const std::string& name : kernels(program.text))
    whole << "EMULATED_EXPORT(" << name << ", " << name << ", " << waits << ")\n";
  for (size_t i = 0; i < program.expressions.size(); ++i) {
    program.names.push_back("expression" + std::to_string(i));
    whole << "EMULATED_EXPORT(" << program.names[i] << ", (" << program.expressions[i] << "), "
          << waits << ")\n";
  }
  std::string text = whole.str(), key = text + flags + read(EMULATOR "/prelude.key");
  char name[40];
  snprintf(name, sizeof name, "%016lx%016lx", hash(key, 0xCBF29CE484222325), hash(key, 0x9E3779B9));
  std::string library = std::string(EMULATOR "/kernels/") + name + ".so";
  program.cubin = "emulated:" + library;
  if (access(library.c_str(), R_OK) == 0) return OK;
  std::string scratch = library + "." + std::to_string(getpid());
  std::ofstream(scratch + ".cpp") << text;
  std::string command = "g++ " EMULATOR_OPTIONS " -shared -include " EMULATOR "/prelude.h" + flags +
                        " -o " + scratch + " " + scratch + ".cpp 2> " + scratch + ".log";
  int status = system(command.c_str());
  program.log = read(scratch + ".log");
  if (status == 0) rename(scratch.c_str(), library.c_str());
  if (status == 0) rename((scratch + ".cpp").c_str(), (library + ".cpp").c_str());  // to look at
  unlink((scratch + ".log").c_str());
  return status == 0 ? OK : COMPILATION;
}

int give(const std::string& text, char* to) {
  memcpy(to, text.c_str(), text.size() + 1);
  return OK;
}

}  // namespace

extern "C" {

const char* nvrtcGetErrorString(int status) {
  return status == COMPILATION ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR";
}
int nvrtcVersion(int* major, int* minor) { return *major = 13, *minor = 2, OK; }
int nvrtcCreateProgram(Program** result, const char* text, const char*, int, const char**,
                       const char**) {
  *result = new Program{text, "", "", {}, {}};
  return OK;
}
int nvrtcDestroyProgram(Program** program) {
  delete *program;
  *program = nullptr;
  return OK;
}
int nvrtcAddNameExpression(Program* program, const char* expression) {
  program->expressions.push_back(expression);
  return OK;
}
int nvrtcGetLoweredName(Program* program, const char* expression, const char** name) {
  for (size_t i = 0; i < program->names.size(); ++i)
    if (program->expressions[i] == expression) return *name = program->names[i].c_str(), OK;
  return NO_NAME_EXPRESSION;
}
int nvrtcCompileProgram(Program* program, int count, const char** options) {
  std::string flags;
  bool flush = false;
  for (int i = 0; i < count; ++i) {
    std::string option = options[i];
    if (option.rfind("-I", 0) == 0 || option.rfind("-D", 0) == 0) flags += " '" + option + "'";
    if (option == "-ftz=true") flush = true;
  }
  // The processor flushes both float and double or neither.
  flush = flush && !has_any(program->text, {"typedef double", "CArray<double", "ELEMENT double"});
  return compile(*program, flags, flush);
}
int nvrtcGetProgramLogSize(Program* program, size_t* size) {
  return *size = program->log.size() + 1, OK;
}
int nvrtcGetProgramLog(Program* program, char* log) { return give(program->log, log); }
int nvrtcGetCUBINSize(Program* program, size_t* size) {
  return *size = program->cubin.size() + 1, OK;
}
int nvrtcGetCUBIN(Program* program, char* cubin) { return give(program->cubin, cubin); }
// CuPy asks for the assembly of an empty program to learn the compiler's version.
int nvrtcGetPTXSize(Program* program, size_t* size) { return nvrtcGetCUBINSize(program, size); }
int nvrtcGetPTX(Program* program, char* text) { return nvrtcGetCUBIN(program, text); }

}  // extern "C"
