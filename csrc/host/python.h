// The part of Python's C API that the bindings use: the limited one, so that one build serves Python 3.10 and later.
#pragma once
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace fastlora {

// An exception that is set in Python already.
struct PythonError {};

// A reference to an object, of which this is the owner.
class Ref {
 public:
  // Takes over a new reference; null is an exception that Python has set.
  explicit Ref(PyObject* object) : object_(object) {
    if (!object) throw PythonError();
  }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

inline Ref none() {
  Py_INCREF(Py_None);
  return Ref(Py_None);
}

inline std::string text_of(PyObject* string) {
  Py_ssize_t size;
  const char* data = PyUnicode_AsUTF8AndSize(string, &size);
  if (!data) throw PythonError();
  return std::string(data, size);
}

inline std::string repr(PyObject* object) { return text_of(Ref(PyObject_Repr(object)).get()); }

// A Python TypeError.
struct TypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Other threads run Python while this lives.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  Unlocked(const Unlocked&) = delete;
  ~Unlocked() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

}  // namespace fastlora
