#version 330
// Skin a vertex of a person with its four bones, on the graphics side.

in vec3 position;  // at rest
in vec3 normal;
in vec2 uv;
in vec4 bones;
in vec4 weights;
in vec2 tag;  // which mesh: 0 skin, 1 tights, 2 skirt, 3 long hair, 4 eyes, 5 hair cap; place along the arm

uniform mat4 view_projection;
uniform BoneBlock { mat4 bone_matrices[128]; };
uniform float inflate[6];  // metres that each mesh is pushed out along its normals
uniform float ankle;
uniform float shoe_size;

out vec3 world;
out vec3 turned;
out vec3 rest;
out vec2 texture_at;
out float arm;
flat out int mesh;

void main() {
    mesh = int(tag.x + 0.5);
    float out_by = inflate[mesh] + (mesh == 1 && position.z < ankle ? shoe_size : 0.0);
    mat4 blend = bone_matrices[int(bones.x)] * weights.x + bone_matrices[int(bones.y)] * weights.y
               + bone_matrices[int(bones.z)] * weights.z + bone_matrices[int(bones.w)] * weights.w;
    vec4 posed = blend * vec4(position + normal * out_by, 1.0);
    world = posed.xyz;
    turned = mat3(blend) * normal;
    rest = position;
    texture_at = uv;
    arm = tag.y;
    gl_Position = view_projection * posed;
}
