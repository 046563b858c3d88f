// The functions that fill the tables of cuda_tables.h, by op family.
#pragma once

#include "cuda/cuda_tables.h"
#include "cuda/device.h"

namespace fastmaml::FASTMAML_CUDA_NS {

template <class T>
void add_vector_ops(OpTable& table);  // vector.cu
template <class T, Precision precision = Precision::float32>
void add_linear_ops(OpTable& table);  // linear.cu
template <class T, Precision precision = Precision::float32>
void add_conv2d_ops(OpTable& table);  // conv2d.cu
template <class T>
void add_batch_norm_ops(OpTable& table);  // batch_norm.cu
template <class T>
void add_group_norm_ops(OpTable& table);  // group_norm.cu
template <class T>
void add_pointwise_ops(OpTable& table);  // pointwise.cu
template <class T>
void add_pool2d_ops(OpTable& table);  // pool2d.cu
template <class T>
void add_norm_pool_act_ops(OpTable& table);  // norm_pool_act.cu
template <class T>
void add_loss_ops(OpTable& table);  // loss.cu
template <class T>
void add_update_ops(OpTable& table);  // updates.cu
template <class T>
void add_update_rule_ops(OpTable& table);  // update_rule.cu
template <class T>
const Device* device();  // device.cu
template <class T>
void add_resident(OpTable& table);  // resident.cu

}  // namespace fastmaml::FASTMAML_CUDA_NS
