// Restores an HDF5 file, as Keras and h5py write it, and reads it with the HDF5 library: prints the name, shape and first
// values of each data set.
//
//   h5c++ -std=c++17 -I.. hdf5_weights.cpp -o hdf5_weights -lssl -lcrypto -pthread
//   ./hdf5_weights weights.h5 entity/project/run_id
//
// Needs the HDF5 library for C++ (Debian: libhdf5-dev).
// SPDX-License-Identifier: MIT
#include "wandb_restore.hpp"

#include <H5Cpp.h>

#include <algorithm>
#include <cstddef>
#include <iostream>
#include <string>
#include <vector>

namespace {

void show_data_set(const H5::DataSet& data, const std::string& name) {
  const H5::DataSpace space = data.getSpace();
  std::vector<hsize_t> shape(static_cast<std::size_t>(space.getSimpleExtentNdims()));
  if (!shape.empty()) space.getSimpleExtentDims(shape.data());
  std::cout << name << " [";
  for (std::size_t i = 0; i < shape.size(); ++i) std::cout << (i == 0 ? "" : ",") << shape[i];
  std::cout << "]:";
  std::vector<float> values(static_cast<std::size_t>(space.getSimpleExtentNpoints()));
  data.read(values.data(), H5::PredType::NATIVE_FLOAT);
  for (std::size_t i = 0; i < (std::min)(values.size(), std::size_t{3}); ++i) std::cout << ' ' << values[i];
  std::cout << (values.size() > 3 ? " ...\n" : "\n");
}

void show_group(const H5::Group& group, const std::string& path) {
  for (hsize_t i = 0; i < group.getNumObjs(); ++i) {
    const std::string name = group.getObjnameByIdx(i);
    if (group.childObjType(name) == H5O_TYPE_GROUP) {
      show_group(group.openGroup(name), path + name + '/');
    } else if (group.childObjType(name) == H5O_TYPE_DATASET) {
      show_data_set(group.openDataSet(name), path + name);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: hdf5_weights NAME RUN_PATH\n";
    return 2;
  }
  H5::Exception::dontPrint();
  try {
    const auto restored = wandb::restore(argv[1], argv[2]);
    const H5::H5File file(restored.name(), H5F_ACC_RDONLY);
    show_group(file.openGroup("/"), "");
  } catch (const wandb::error& failure) {
    std::cerr << failure.what() << '\n';
    return 1;
  } catch (const H5::Exception& failure) {
    std::cerr << argv[1] << " is not an HDF5 file that can be read: " << failure.getDetailMsg() << '\n';
    return 1;
  }
}
