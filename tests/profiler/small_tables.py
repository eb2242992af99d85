"""A small table in every imported format: (format, name, text)."""

from __future__ import annotations

GEMM = (
    "device,gemm_dtype,m,n,k,latency_ms\n"
    "NVIDIA L40S,bfloat16,16,4096,4096,0.0551\n"
    "NVIDIA L40S,fp8,64,4096,4096,0.0278\n"
    "NVIDIA L40S,fp8_block,64,4096,4096,0.03\n"
)
DECODE = (
    "device,kernel_source,head_dim,num_heads,num_key_value_heads,batch_size,kv_len,latency_ms\n"
    "NVIDIA H100 80GB HBM3,vllm_flash_attn_fa3,128,32,8,16,1025,0.0551\n"
    "NVIDIA H100 80GB HBM3,vllm_flash_attn_fa3,128,32,8,32,1025,0.0912\n"
)
PREFILL = (
    "device,kernel_source,head_dim,num_heads,num_key_value_heads,batch_size,isl,latency_ms\n"
    "NVIDIA A100-SXM4-80GB,vllm_flash_attn,128,32,8,1,1024,0.2512\n"
)
OWN_ATTENTION = (
    "framework,version,device,op_name,kernel_source,batch_size,isl,num_heads,num_key_value_heads,head_dim,beam_width,"
    "attn_dtype,kv_cache_dtype,step,latency\n"
    "SGLang,0.5.1,NVIDIA L40S,generation_attention,flashinfer,4,1,32,8,128,1,bfloat16,bfloat16,511,0.0312\n"
    "SGLang,0.5.1,NVIDIA L40S,generation_attention,flashinfer,8,1,32,0,128,1,bfloat16,bfloat16,511,0.1925\n"
)
EXTRACT_REDUCE = (
    "gpu,impl,op_name,num_gpus,message_elements,latency_ms\n"
    "H100-SXM-80GB,nccl-2.29.2,all_gather,2,256,0.00531\n"
    "H100-SXM-80GB,nccl-2.29.2,all_reduce,2,1048576,0.0331\n"
)
OWN_REDUCE = (
    "framework,version,device,op_name,kernel_source,nccl_dtype,num_gpus,message_size,latency\n"
    "NCCL,2.27.3,NVIDIA L40S,all_reduce,NCCL,half,2,1048576,0.1931\n"
    "NCCL,2.27.3,NVIDIA L40S,all_reduce,NCCL,int8,2,1048576,0.0971\n"
)
EXPERTS = (
    "gpu,kernel_source,num_tokens,hidden_size,inter_size,topk,num_experts,moe_tp_size,latency_ms\n"
    "l40s,vllm_moe,1,2048,512,8,256,1,0.0297\n"
)
VIDUR_LAYERS = (
    "gpu,model,input_layernorm_ms,attn_pre_proj_ms,attn_rope_ms,attn_post_proj_ms,post_attention_layernorm_ms,"
    "mlp_up_proj_ms,mlp_act_ms,mlp_down_proj_ms,add_ms,n_head,n_kv_head,n_embd,n_expanded_embd,use_gated_mlp,"
    "num_tokens,tp\n"
    "A100,Qwen/Qwen-72B,0.008,0.251,0.012,0.091,0.008,0.512,0.019,0.2565,0.002,64,64,8192,24576,True,1,1\n"
    "A100,microsoft/phi-2,0.021,0.211,0.066,0.073,,0.298,0.068,0.335,0.004,32,32,2560,10240,False,4,1\n"
)
ATTENTION = (
    "gpu,n_embd,n_q_head,n_kv_head,tp,batch_size,prefill_chunk_size,kv_cache_size,is_prefill,attn_prefill_ms,"
    "attn_decode_ms\n"
    "A100,8192,64,8,2,1,0,32,False,,0.0151\n"
    "A100,8192,64,8,2,1,4096,0,True,2.3161,\n"
)
COLLECTIVES = (
    "topology,collective,num_workers,devices_per_node,bytes,median_ms\n"
    "a100_dgx,all_reduce,2,2,2048,0.0431\n"
    "a40,send_recv,2,1,67108864,18.1181\n"
    "a40,all_reduce,4,2,67108864,18.1181\n"
)
STEPS = "gpu,batch_size,sampler_e2e_ms\nA100,8,0.588016\nA40,128,5.23308\n"
SPLITWISE = (
    "model,hardware,prompt_size,batch_size,token_size,prompt_time_ms,token_time_ms,tensor_parallel\n"
    "llama2-70b,a100-80gb,512,1,128,196.253,54.8795,2\n"
    "llama2-70b,h100-80gb-pcap,512,1,128,99.271,36.2344,8\n"
)
LAYERS = (
    "gpu,model,layer,tokens,tp,latency_ns\n"
    "A6000,meta-llama/Llama-3.1-8B,embedding,1,1,2575\n"
    "H100,meta-llama/Llama-3.1-8B,q_proj,64,1,17653\n"
)
SMALL_TABLES = (
    ("aiconfigurator", "GEMMs", GEMM),
    ("aiconfigurator", "decode", DECODE),
    ("aiconfigurator", "prefill", PREFILL),
    ("aiconfigurator", "own attention", OWN_ATTENTION),
    ("aiconfigurator", "all-reduce", EXTRACT_REDUCE),
    ("aiconfigurator", "own all-reduce", OWN_REDUCE),
    ("aiconfigurator", "experts", EXPERTS),
    ("vidur", "layers", VIDUR_LAYERS),
    ("vidur", "attention", ATTENTION),
    ("vidur", "collectives", COLLECTIVES),
    ("vidur", "steps", STEPS),
    ("splitwise", "end to end", SPLITWISE),
    ("llmservingsim", "layers", LAYERS),
    ("llmservingsim", "attention", ATTENTION),
)
